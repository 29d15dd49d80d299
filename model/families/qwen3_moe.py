"""Qwen3-MoE: Qwen3's attention, feed-forwards of experts, or dense as Qwen3's."""

from __future__ import annotations

from .llama import HeadNormAttention, HeadNormLayer
from .mixture import MixtureHalf


class Qwen3MoeLayer(MixtureHalf, HeadNormAttention):
    """Norms per head; softmax routing, renormalised where the config has it."""

    projections = HeadNormAttention.projections
    own = {"mlp.gate": "Qwen3MoeTopKRouter", "mlp.experts": "Qwen3MoeExperts"}  # noqa: RUF012


LAYER = Qwen3MoeLayer
DENSE = HeadNormLayer
