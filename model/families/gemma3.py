"""Gemma 3: Gemma 2's layer with norms per head instead of softcaps, and a rotary table per kind of layer."""

from __future__ import annotations

from dataclasses import replace

from torch import nn

from ...parallel.sequence.attention import AttentionSpec
from .gemma2 import Gemma2Layer
from .llama import HeadNormLayer


class Gemma3Layer(Gemma2Layer, HeadNormLayer):
    """Adds per-head norms of q and k, and a rotary table per kind of layer."""

    norms = (*Gemma2Layer.norms, "self_attn.q_norm", "self_attn.k_norm")

    def __init__(self, layer: nn.Module) -> None:
        super().__init__(layer)
        self.rope_key = self.attention.layer_type

    def _spec(self) -> AttentionSpec:
        # Hugging Face's Gemma 3 never applies a softcap to scores, whatever its config holds.
        return replace(super()._spec(), softcap=None)


LAYER = Gemma3Layer
