"""The second half of a layer that is a mixture of experts, as Hugging Face has it: router, fused weights, perhaps a shared expert."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ...memory.executor.experts import Experts
from ...memory.executor.grouped import GroupedProjection
from ...memory.executor.mixture import MixtureFeedForward
from ...memory.executor.token_local import FeedForward, LayerSteps
from .adapter import LayerAdapter
from .projection import Projection


class MixtureHalf(LayerAdapter):
    """Softmax over all experts, the best K of them, renormalised or not; experts with a gate and an up in one weight (E, 2 I, M)."""

    router: ClassVar[str] = "mlp.gate"
    """Name of the router in the layer."""
    wide_weights: ClassVar[bool] = False
    """Weights of the chosen experts stay in float32; otherwise they are rounded to the precision of the logits."""
    has_shared = scales_shared = False
    # Routing follows from values, so one graph cannot hold the whole half; its steps are compiled one by one.
    traceable = False

    def __init__(self, layer: nn.Module) -> None:
        super().__init__(layer)
        router: Any = layer.get_submodule(self.router)
        self.num_experts, self.per_token = int(router.num_experts), int(router.top_k)
        self.renormalise = bool(getattr(router, "norm_topk_prob", True))

    def feed_forward(self, steps: LayerSteps) -> FeedForward:
        """Implements `LayerAdapter.feed_forward`."""
        return MixtureFeedForward(steps, self)

    def route(self, x: Tensor, graph: bool = False) -> tuple[Tensor, Tensor]:
        """Rows (T, M) -> their norm (T, M) and the router's logits (T, E)."""
        h = self.layer.post_attention_layernorm(x)  # type: ignore[operator]
        router: Any = self.layer.get_submodule(self.router)
        return h, Projection(router.weight, getattr(router, "bias", None))(h, graph=graph)

    def choose(self, logits: Tensor) -> Tensor:
        """Experts of each token (T, K)."""
        return self._probabilities(logits).topk(self.per_token, dim=-1).indices

    def weigh(self, logits: Tensor, chosen: Tensor) -> Tensor:
        """Weights of the chosen experts (T, K)."""
        weights = self._probabilities(logits).gather(1, chosen.long())
        if self.renormalise:
            weights = weights / weights.sum(-1, keepdim=True)
        return weights if self.wide_weights else weights.to(logits.dtype)

    def experts(self) -> Experts:
        """The experts with their weights as they are now."""
        gate_up, down = (self.weight(f"mlp.experts.{name}_proj") for name in ("gate_up", "down"))
        return Experts(GroupedProjection(gate_up), GroupedProjection(down), self.activate)

    def activate(self, gate_up: Tensor) -> Tensor:
        """Gate and up, one after the other (R, 2 I), to the inputs of the down projection (R, I)."""
        own: Any = self.layer.get_submodule("mlp.experts")
        gate, up = gate_up.chunk(2, dim=-1)
        product: Tensor = own.act_fn(gate) * up
        return product

    @staticmethod
    def _probabilities(logits: Tensor) -> Tensor:
        return logits.softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32))


class SharedMixtureHalf(MixtureHalf):
    """Softmax routing, and one more expert that all tokens visit, scaled token by token."""

    projections = (*(f"mlp.shared_expert.{name}_proj" for name in ("gate", "up", "down")), "mlp.shared_expert_gate")
    has_shared = scales_shared = True

    def shared_in(self, h: Tensor, graph: bool = False) -> tuple[Tensor, Tensor]:
        """Normed rows (T, M) -> gate and up (T, S) each."""
        return self.projection("mlp.shared_expert.gate_proj")(h, graph=graph), self.projection("mlp.shared_expert.up_proj")(h, graph=graph)

    def shared_out(self, h: Tensor, gate: Tensor, up: Tensor, graph: bool = False) -> Tensor:
        """Normed rows (T, M) and what shared_in made of them -> the shared expert's part of the output (T, M)."""
        # Each factor's value is needed for the other's gradient, so there is no graph without them.
        out = self.projection("mlp.shared_expert.down_proj")(self.layer.mlp.shared_expert.act_fn(gate) * up)  # type: ignore[union-attr,operator]
        return self.projection("mlp.shared_expert_gate")(h).sigmoid() * out
