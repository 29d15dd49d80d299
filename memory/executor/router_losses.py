"""Losses of the routers: how evenly a whole step uses the experts of a layer, and how large the routers' logits are.

For each layer, with N tokens in the step, E experts, probabilities p of a token and f_i the share of all rows that expert i gets:
balance x E sum_i f_i (1/N) sum_t p_ti, which is `balance` times 1 where use is even (Switch Transformer, arXiv:2101.03961, with f over the
whole batch as in arXiv:2501.11873), and z x (1/N) sum_t logsumexp(logits_t)^2 (ST-MoE, arXiv:2202.08906). Layers are summed.

Note: f is no function of the weights, but the gradient needs it before the first backward of a step: the step counts first
(training/step.py). So the gradient is the same however the step is split over ranks and micro-batches.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class RouterLosses:
    """The losses' weights, what a step knows of its routing, and the sums that their values are made of."""

    def __init__(self, balance: float = 0.0, z: float = 0.0) -> None:
        self.balance, self.z = balance, z
        self.factor = 1
        """What the step's other losses are multiplied by before their backward: an engine's, whose reduction divides by it."""
        self._num_tokens = 0
        self._shares: dict[int, Tensor] | None = None
        self._sums: dict[int, Tensor] = {}

    @property
    def active(self) -> bool:
        """Whether there is any such loss."""
        return self.balance > 0 or self.z > 0

    def begin(self, num_tokens: int) -> None:
        """Start a step of so many tokens on all ranks."""
        self._num_tokens, self._shares = num_tokens, None
        self._sums.clear()

    @property
    def lacks_shares(self) -> bool:
        """Whether a backward needs `use` first."""
        return self.balance > 0 and self._shares is None

    def use(self, counts: Tensor, layers: Sequence[int]) -> None:
        """Take rows by layer and expert (L, E) of all ranks and micro-batches of the step; `layers`: the numbers of these layers."""
        shares = counts / counts.sum(1, keepdim=True).clamp(min=1)
        self._shares = dict(zip(layers, shares, strict=True))

    def add(self, layer: int, logits: Tensor) -> None:
        """Count the probabilities and logits (T, E) of a forward pass towards the losses' values."""
        if not self.active:
            return
        wide = _wide(logits.detach())
        sums = torch.cat([wide.softmax(-1).sum(0), wide.logsumexp(-1).square().sum().unsqueeze(0)])
        self._sums[layer] = self._sums[layer] + sums if layer in self._sums else sums

    def take(self) -> Tensor | None:
        """Sums by layer (L, E + 1) since the last time: of each expert's probabilities, and of squared log-sum-exps."""
        sums = [self._sums[layer] for layer in sorted(self._sums)]
        self._sums.clear()
        return torch.stack(sums) if sums else None

    def gradient(self, layer: int, logits: Tensor) -> Tensor:
        """Gradient of both losses in one layer's logits (T, E), in their dtype."""
        assert self._num_tokens > 0 and not self.lacks_shares, "a step counts its routing before its first backward"
        wide = _wide(logits.detach())
        probabilities = wide.softmax(-1)
        total = torch.zeros_like(wide)
        if self.balance > 0 and self._shares is not None:
            shares = self._shares[layer].to(wide.dtype)
            total += self.balance * wide.shape[1] * probabilities * (shares - (probabilities @ shares).unsqueeze(1))
        if self.z > 0:
            total += 2 * self.z * wide.logsumexp(-1, keepdim=True) * probabilities
        return (total * (self.factor / self._num_tokens)).to(logits.dtype)


def _wide(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


class _AddGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, losses: RouterLosses, layer: int) -> Tensor:
        ctx.save_for_backward(logits)
        ctx.losses, ctx.layer = losses, layer
        return logits.view_as(logits)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (logits,) = ctx.saved_tensors
        return gradient + ctx.losses.gradient(ctx.layer, logits), None, None


def with_losses(logits: Tensor, losses: RouterLosses, layer: int) -> Tensor:
    """The logits (T, E) as they are, with the losses' gradient added where they are differentiated."""
    return _AddGradient.apply(logits, losses, layer) if losses.active else logits  # type: ignore[no-any-return]
