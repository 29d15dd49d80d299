"""Gemma 2 and 3: norms before and after both halves, alternating windows, softcap (2) or per-head norms and two rotary tables (3)."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor, nn

from ...errors import ConfigError
from ...parallel.sequence.attention import AttentionSpec
from .llama import LlamaLayer


class Gemma2Layer(LlamaLayer):
    """Sandwich norms around attention and MLP."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__(layer)
        if getattr(self.attention.config, "use_bidirectional_attention", False):
            raise ConfigError(
                "model.extra.use_bidirectional_attention",
                found="True",
                expected="causal attention: this trains language models",
                hint="model.extra.use_bidirectional_attention=false",
            )

    def after_attention(self, x: Tensor, o: Tensor) -> Tensor:
        layer = self.layer
        x = x + layer.post_attention_layernorm(self.attention.o_proj(o.flatten(1)))
        return x + layer.post_feedforward_layernorm(layer.mlp(layer.pre_feedforward_layernorm(x)))

    def after_attention_graph(self, x: Tensor, o: Tensor) -> Tensor:
        # The layer ends in a norm, whose gradient needs the MLP's values.
        return self.after_attention(x, o)


class Gemma3Layer(Gemma2Layer):
    """Adds per-head norms of q and k, and a rotary table per kind of layer."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__(layer)
        self.rope_key = self.attention.layer_type

    def _spec(self) -> AttentionSpec:
        # Hugging Face's Gemma 3 never applies a softcap to scores, whatever its config holds.
        return replace(super()._spec(), softcap=None)

    def _project(self, h: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = super()._project(h)
        return self.attention.q_norm(q), self.attention.k_norm(k), v
