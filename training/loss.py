"""The end of the model: final norm, head and cross-entropy, by chunks of tokens, never the logits of more than one chunk.

Gradients are made chunk by chunk inside forward, while the chunk's logits exist (StreamBP, 2506.03077, sec. 3.1); backward only
hands them over. Gradients of the norm and of the head are summed over chunks in float32 (float64 for float64) and returned
once, so FSDP2 sees an ordinary module. Tokens without a target cost nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

IGNORE = -100


@dataclass(frozen=True, slots=True)
class LossOptions:
    """`chunk_tokens`: tokens per chunk; `softcap`: logits become cap * tanh(logits / cap); `z_loss`: weight of logsumexp^2."""

    chunk_tokens: int
    softcap: float | None = None
    z_loss: float = 0.0


def chunked_cross_entropy(
    x: Tensor,
    norm: nn.Module,
    weight: Tensor,
    targets: Tensor,
    *,
    scale: float,
    options: LossOptions,
    overwrite: bool = False,
    not_finite: Tensor | None = None,
) -> Tensor:
    """scale x sum of token losses, a scalar in float32 (float64 for float64).

    x (T, M): what goes into `norm`, a module that treats each row alone; head weight (V, M), targets (T,) with -100 where there
    is no loss. With scale = 1 / target tokens of the step, the sum over micro-batches and ranks is the mean loss.

    Of length T there is x and its gradient, which is written over x itself with `overwrite` (nothing may read x afterwards).
    Peak beside them: about 10 x V x chunk_tokens bytes in bfloat16, and the head's gradient in float32.

    `not_finite` (T,), bool: set where a row's loss is not a finite number; nothing waits for it.
    """
    job = _Job(norm, targets, scale, options, overwrite, not_finite)
    return _ChunkedCrossEntropy.apply(x, weight, job, *norm.parameters())  # type: ignore[no-any-return]


@dataclass(frozen=True, slots=True)
class _Job:
    norm: nn.Module
    targets: Tensor
    scale: float
    options: LossOptions
    overwrite: bool
    not_finite: Tensor | None


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, job: _Job, *parameters: Tensor) -> Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        wants_x, wants_weight, _, *wants = ctx.needs_input_grad
        trained = [p for p, wanted in zip(parameters, wants, strict=True) if wanted]
        sums = HeadGradients(x, weight if wants_weight else None, trained, wants_x=wants_x, overwrite=job.overwrite)
        total = x.new_zeros((), dtype=wide)
        rows = (job.targets != IGNORE).nonzero().squeeze(1)
        for picked in rows.split(job.options.chunk_tokens):
            leaf, h = sums.normed(picked, job.norm)
            losses, d_logits = _chunk(F.linear(h, weight).to(wide), job.targets[picked], job.options)
            total += losses.sum()
            if job.not_finite is not None:
                job.not_finite[picked] = ~losses.isfinite()
            sums.add(picked, leaf, h, d_logits.mul_(job.scale).to(h.dtype), weight)
        sums.close(job.targets == IGNORE)
        ctx.sums, ctx.wants = sums, wants
        return total * job.scale

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        # Not kept while the layers go backward: it holds the head's gradient in float32.
        sums, ctx.sums = ctx.sums, None
        d_x, d_weight, d_norm = sums.take(upstream)
        parts = iter(d_norm)
        return d_x, d_weight, None, *(next(parts) if wanted else None for wanted in ctx.wants)


class HeadGradients:
    """Gradients of x, the head and the norm's parameters as chunks of rows add to them.

    x's gradient has x's dtype and, with `overwrite`, x's storage; a chunk is read before it is written. The others are sums in
    float32 (float64 for float64).
    """

    def __init__(self, x: Tensor, weight: Tensor | None, trained: Sequence[Tensor], *, wants_x: bool, overwrite: bool) -> None:
        wide = torch.promote_types(x.dtype, torch.float32)
        self._x, self._trained = x.detach(), list(trained)
        self._d_x: Tensor | None = None
        if wants_x:
            self._d_x = self._x if overwrite else torch.empty_like(x)
        self._d_weight = None if weight is None else torch.zeros_like(weight, dtype=wide)
        self._weight_dtype = None if weight is None else weight.dtype
        self._d_norm = [torch.zeros_like(p, dtype=wide) for p in self._trained]

    def normed(self, picked: Tensor, norm: nn.Module) -> tuple[Tensor, Tensor]:
        """Rows `picked` of x, and the norm of them with its graph from there."""
        leaf = self._x.index_select(0, picked)
        wanted = self._d_x is not None or bool(self._trained)
        with torch.set_grad_enabled(wanted):
            leaf.requires_grad_(wanted)
            return leaf, norm(leaf)

    def add(self, picked: Tensor, leaf: Tensor, h: Tensor, d_logits: Tensor, weight: Tensor) -> None:
        """What rows `picked` add, given the gradient (C, V) of their logits h @ weight^T in h's dtype."""
        if self._d_weight is not None:
            self._d_weight += d_logits.T @ h.detach()
        if not leaf.requires_grad:
            return
        d_leaf, *d_norm = torch.autograd.grad(h, [leaf, *self._trained], d_logits @ weight)
        if self._d_x is not None:
            self._d_x[picked] = d_leaf
        for total, part in zip(self._d_norm, d_norm, strict=True):
            total += part

    def close(self, unused: Tensor) -> None:
        """After the last chunk: rows `unused` (T,), bool, have no gradient. x is not needed any more."""
        if self._d_x is not None:
            self._d_x.masked_fill_(unused.unsqueeze(1), 0.0)
        del self._x

    def take(self, upstream: Tensor) -> tuple[Tensor | None, Tensor | None, list[Tensor]]:
        """(gradient of x, of the head, of the norm's parameters), times `upstream`, in the dtypes of what they belong to."""
        d_weight = None if self._d_weight is None else self._d_weight.mul_(upstream).to(self._weight_dtype)
        d_norm = [total.mul_(upstream).to(p.dtype) for total, p in zip(self._d_norm, self._trained, strict=True)]
        return None if self._d_x is None else self._d_x.mul_(upstream), d_weight, d_norm


def _chunk(logits: Tensor, targets: Tensor, options: LossOptions) -> tuple[Tensor, Tensor]:
    """The loss of each row (C,), and its gradient with respect to the raw logits (C, V), written over them."""
    slope = None
    if options.softcap is not None:
        bent = (logits / options.softcap).tanh_()
        logits, slope = bent * options.softcap, 1 - bent * bent
    normaliser = logits.logsumexp(-1)
    losses = normaliser - logits.gather(1, targets.unsqueeze(1)).squeeze(1)
    gradient = logits.sub_(normaliser.unsqueeze(1)).exp_()
    if options.z_loss:
        losses = losses + options.z_loss * normaliser * normaliser
        gradient *= (1 + 2 * options.z_loss * normaliser).unsqueeze(1)
    gradient.scatter_add_(1, targets.unsqueeze(1), gradient.new_full((len(targets), 1), -1.0))
    return losses, gradient if slope is None else gradient.mul_(slope)
