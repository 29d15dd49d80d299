"""Gemma 2 and 3: norms before and after both halves, alternating windows, softcap (2) or per-head norms and two rotary tables (3)."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor, nn

from ...errors import ConfigError
from ...parallel.sequence.attention import AttentionSpec
from .llama import HeadNormLayer, LlamaLayer, linear


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

    def residual(self, x: Tensor, o: Tensor, graph: bool = False) -> Tensor:
        # The norm's gradient needs the projected values, so there is no graph without them.
        return x + self.layer.post_attention_layernorm(self.attention.o_proj(o.flatten(1)))  # type: ignore[no-any-return,operator]

    def mlp_in(self, x: Tensor, graph: bool = False) -> tuple[Tensor, Tensor]:
        mlp, h = self.layer.mlp, self.layer.pre_feedforward_layernorm(x)  # type: ignore[operator]
        return linear(mlp.gate_proj, h, graph), linear(mlp.up_proj, h, graph)  # type: ignore[arg-type,union-attr]

    def mlp_out(self, x: Tensor, gate: Tensor, up: Tensor, graph: bool = False) -> Tensor:
        mlp = self.layer.mlp
        return x + self.layer.post_feedforward_layernorm(mlp.down_proj(mlp.act_fn(gate) * up))  # type: ignore[no-any-return,union-attr,operator]


class Gemma3Layer(Gemma2Layer, HeadNormLayer):
    """Adds per-head norms of q and k, and a rotary table per kind of layer."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__(layer)
        self.rope_key = self.attention.layer_type

    def _spec(self) -> AttentionSpec:
        # Hugging Face's Gemma 3 never applies a softcap to scores, whatever its config holds.
        return replace(super()._spec(), softcap=None)
