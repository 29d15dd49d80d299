"""The second half of a layer as DeepSeek-V3 has it: sigmoid scores, groups of experts, a bias that only choices see, a shared expert.

Source: DeepSeek-V3 (arXiv:2412.19437), section 2.1.2; the bias and its update (memory/executor/router_bias.py): arXiv:2408.15664.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .mixture import MixtureHalf
from .projection import Projection

_NO_ZERO = 1e-20
"""What is added to a sum of scores before it divides them."""


class SigmoidMixtureHalf(MixtureHalf):
    """Logits in float32 at least; the best K of `topk_group` groups by score + bias, weighed by their scores alone."""

    projections = tuple(f"mlp.shared_experts.{name}_proj" for name in ("gate", "up", "down"))
    has_shared = True
    wide_weights = True

    def __init__(self, layer: nn.Module) -> None:
        super().__init__(layer)
        router: Any = layer.get_submodule(self.router)
        self.num_groups, self.groups_per_token = int(router.num_group), int(router.topk_group)
        self.scale = float(router.routed_scaling_factor)

    @property
    def correction_bias(self) -> Tensor:
        """The bias (E,) that choices see, as it is now; no gradient reaches it."""
        bias: Tensor = self.layer.get_submodule(self.router).e_score_correction_bias  # type: ignore[assignment]
        return bias

    def route(self, x: Tensor, graph: bool = False) -> tuple[Tensor, Tensor]:
        """Rows (T, M) -> their norm (T, M) and the router's logits (T, E), in float32 at least."""
        h = self.layer.post_attention_layernorm(x)  # type: ignore[operator]
        wide = torch.promote_types(h.dtype, torch.float32)
        router: Any = self.layer.get_submodule(self.router)
        return h, Projection(router.weight.to(wide), None)(h.to(wide), graph=graph)

    def choose(self, logits: Tensor) -> Tensor:
        """Experts of each token (T, K): the best by score + bias, in the groups whose two best add up to most."""
        wanted = logits.sigmoid() + self.correction_bias
        by_group = wanted.unflatten(1, (self.num_groups, -1))
        best = by_group.topk(2, dim=-1).values.sum(-1).topk(self.groups_per_token, dim=-1, sorted=False).indices
        left_out = torch.ones(by_group.shape[:2], dtype=torch.bool, device=logits.device).scatter_(1, best, False)
        wanted = by_group.masked_fill(left_out.unsqueeze(2), float("-inf")).flatten(1)
        return wanted.topk(self.per_token, dim=-1, sorted=False).indices

    def weigh(self, logits: Tensor, chosen: Tensor) -> Tensor:
        """Weights of the chosen experts (T, K), in the precision of the logits."""
        weights = logits.sigmoid().gather(1, chosen.long())
        if self.renormalise:
            weights = weights / (weights.sum(-1, keepdim=True) + _NO_ZERO)
        return weights * self.scale

    def shared_in(self, h: Tensor, graph: bool = False) -> tuple[Tensor, Tensor]:
        """Normed rows (T, M) -> gate and up (T, S) each."""
        gate, up = (self.projection(f"mlp.shared_experts.{name}_proj") for name in ("gate", "up"))
        return gate(h, graph=graph), up(h, graph=graph)

    def shared_out(self, gate: Tensor, up: Tensor, graph: bool = False) -> Tensor:
        """What shared_in made -> the shared expert's part of the output (T, M)."""
        product = self.layer.mlp.shared_experts.act_fn(gate) * up  # type: ignore[union-attr,operator]
        return self.projection("mlp.shared_experts.down_proj")(product, graph=graph)
