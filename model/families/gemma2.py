"""Gemma 2: norms before and after both halves, alternating windows, softcaps."""

from __future__ import annotations

from torch import Tensor, nn

from ...errors import ConfigError
from .llama import LlamaLayer


class Gemma2Layer(LlamaLayer):
    """Sandwich norms around attention and MLP."""

    norms = (*LlamaLayer.norms, "pre_feedforward_layernorm", "post_feedforward_layernorm")

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
        return x + self.layer.post_attention_layernorm(self.projection("self_attn.o_proj")(o.flatten(1)))  # type: ignore[no-any-return,operator]

    def mlp_in(self, x: Tensor, graph: bool = False) -> tuple[Tensor, Tensor]:
        h = self.layer.pre_feedforward_layernorm(x)  # type: ignore[operator]
        return self.projection("mlp.gate_proj")(h, graph=graph), self.projection("mlp.up_proj")(h, graph=graph)

    def mlp_out(self, x: Tensor, gate: Tensor, up: Tensor, graph: bool = False) -> Tensor:
        down, norm = self.projection("mlp.down_proj"), self.layer.post_feedforward_layernorm
        return x + norm(down(self.layer.mlp.act_fn(gate) * up))  # type: ignore[no-any-return,union-attr,operator]


LAYER = Gemma2Layer
