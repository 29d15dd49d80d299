"""Computes final norm, head and loss by chunks of tokens, never the logits of more than one chunk.

Gradients are made chunk by chunk inside forward, while the chunk's logits exist (StreamBP, 2506.03077, sec. 3.1); backward only
hands them over. Gradients of the norm and of the head are summed over chunks in float32 (float64 for float64) and returned
once, so FSDP2 sees an ordinary module. Tokens without a target cost nothing.

Note: losses are functions of log-probabilities. Every objective here is a sum of terms over rows, whose derivative by a row's
log-probability is a number (its slope), or such a sum times one number that is known only at the end (StreamBP, sec. 3.3).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

IGNORE = -100


@dataclass(frozen=True, slots=True)
class LossOptions:
    """Settings of the loss; `chunk_tokens`: tokens per chunk; `softcap`: cap * tanh(logits / cap); `z_loss`: weight of logsumexp^2."""

    chunk_tokens: int
    softcap: float | None = None
    z_loss: float = 0.0
    scale: float = 1.0
    """What logits are multiplied with, before any softcap."""


@dataclass(frozen=True, slots=True)
class Head:
    """The inputs of a loss: x (T, M) before the final norm, a module that treats each row alone; head weight (V, M);
    targets (T,) with -100 where there is no loss."""

    x: Tensor
    norm: nn.Module
    weight: Tensor
    targets: Tensor
    options: LossOptions
    overwrite: bool = False
    """x's gradient is written over x: nothing may read x afterwards."""
    not_finite: Tensor | None = None
    """Flags (T,) bool, set where a row's term is not a finite number; nothing waits for them."""

    def chunks(self) -> tuple[Tensor, ...]:
        """Row numbers of those with a target, `options.chunk_tokens` at a time."""
        return (self.targets != IGNORE).nonzero().squeeze(1).split(self.options.chunk_tokens)

    def normed(self, rows: Tensor) -> Tensor:
        """Rows (C, M) of x -> what the head's weight is multiplied with: their norm, and the scale of logits, which are linear in it."""
        # Without the module's hooks: an engine counts calls, and ranks have different numbers of chunks.
        h: Tensor = self.norm.forward(rows)
        return h if self.options.scale == 1.0 else h * self.options.scale

    @property
    def wide(self) -> torch.dtype:
        """Dtype of losses and logits: float32 (float64 for float64)."""
        return torch.promote_types(self.x.dtype, torch.float32)


class Terms(Protocol):
    """An objective row by row."""

    def __call__(self, rows: Tensor, log_probs: Tensor) -> tuple[Tensor, Tensor]:
        """Terms (C,) of the given rows, and their slopes (C,): derivatives by log_probs (C,), the targets' log-probabilities."""


Seen = Callable[[Tensor, Tensor], None]
"""Told of rows (C,) and the log-probabilities (C,) of their targets, chunk after chunk."""
Finish = Callable[[], tuple[Tensor, Tensor]]
"""Finish after the last chunk: rows `unused` (T,), bool, have no gradient. x is not needed any more."""


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
    """The loss scale x sum of token losses, a scalar in float32 (float64 for float64); arguments as in `Head`.

    With scale = 1 / target tokens of the step, the sum over micro-batches and ranks is the mean loss.
    """
    return cross_entropy(Head(x, norm, weight, targets, options, overwrite, not_finite), scale)


def cross_entropy(head: Head, scale: float, smoothing: float = 0.0, seen: Seen | None = None) -> Tensor:
    """The loss scale x sum over rows of -log p(target) + z_loss x logsumexp^2.

    `smoothing`: share of the target's probability that is spread evenly over the whole vocabulary (1512.00567, sec. 7).
    """
    slope = -scale * (1 - smoothing)

    def terms(rows: Tensor, log_probs: Tensor) -> tuple[Tensor, Tensor]:
        if seen is not None:
            seen(rows, log_probs)
        return log_probs * slope, torch.full_like(log_probs, slope)

    return chunked_loss(head, terms, z_weight=scale * head.options.z_loss, even_weight=-scale * smoothing)


def chunked_loss(head: Head, terms: Terms, *, finish: Finish | None = None, z_weight: float = 0.0, even_weight: float = 0.0) -> Tensor:
    """Sum of the terms of all rows (or what `finish` says), a scalar, with gradients for x, the norm and the head.

    Of length T there is x and its gradient, in x's own place with `overwrite`. Peak beside them: about 10 x V x chunk_tokens
    bytes in bfloat16, and the head's gradient in float32. `z_weight`: of logsumexp^2 per row, added to the sum; `even_weight`:
    of the mean log-probability over the vocabulary.
    """
    job = _Job(head, terms, finish, z_weight, even_weight)
    return _ChunkedLoss.apply(head.x, head.weight, job, *head.norm.parameters())  # type: ignore[no-any-return]


@torch.no_grad()
def chunked_log_probs(head: Head) -> Tensor:
    """Log-probability of each row's target, (T,) in float32 (float64 for float64); 0 where there is none. No gradient.

    Costs one pass over the head: 2 x V x M operations per row with a target.
    """
    out = head.x.new_zeros(len(head.x), dtype=head.wide)
    for rows in head.chunks():
        logits = F.linear(head.normed(head.x[rows]), head.weight).to(head.wide)
        out[rows] = _Chunk(logits, head.targets[rows], head.options.softcap).log_probs
    return out


@torch.no_grad()
def chunked_hits(head: Head) -> Tensor:
    """Log-probability of each row's target, and 1 where no token is likelier: (T, 2) as `chunked_log_probs`; 0 where there is no target."""
    out = head.x.new_zeros(len(head.x), 2, dtype=head.wide)
    for rows in head.chunks():
        logits, targets = F.linear(head.normed(head.x[rows]), head.weight).to(head.wide), head.targets[rows]
        # A cap keeps the order of logits.
        likeliest = logits.argmax(-1) == targets
        out[rows] = torch.stack([_Chunk(logits, targets, head.options.softcap).log_probs, likeliest.to(head.wide)], dim=1)
    return out


@dataclass(frozen=True, slots=True)
class _Job:
    head: Head
    terms: Terms
    finish: Finish | None
    z_weight: float
    even_weight: float


class _ChunkedLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, job: _Job, *parameters: Tensor) -> Tensor:
        head = job.head
        needs_x, needs_weight, _, *needs = ctx.needs_input_grad
        trained = [p for p, wanted in zip(parameters, needs, strict=True) if wanted]
        sums = _Gradients(x, weight if needs_weight else None, trained, needs_x=needs_x, overwrite=head.overwrite)
        total = x.new_zeros((), dtype=head.wide)
        for rows in head.chunks():
            total += _add_chunk(job, rows, weight, sums)
        sums.close(head.targets == IGNORE)
        ctx.sums, ctx.needs, ctx.factor = sums, needs, None
        if job.finish is not None:
            total, ctx.factor = job.finish()
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        # Not kept while the layers go backward: it holds the head's gradient in float32.
        sums, ctx.sums = ctx.sums, None
        d_x, d_weight, d_norm = sums.take(upstream if ctx.factor is None else upstream * ctx.factor)
        parts = iter(d_norm)
        return d_x, d_weight, None, *(next(parts) if wanted else None for wanted in ctx.needs)


def _add_chunk(job: _Job, rows: Tensor, weight: Tensor, sums: _Gradients) -> Tensor:
    """Sum of the rows' terms; their gradients into `sums`. No logits are left when it returns."""
    head = job.head
    leaf, h = sums.normed(rows, head)
    chunk = _Chunk(F.linear(h.detach(), weight).to(head.wide), head.targets[rows], head.options.softcap)
    losses, slopes = job.terms(rows, chunk.log_probs)
    if job.z_weight:
        losses = losses + job.z_weight * chunk.normaliser.square()
    if head.not_finite is not None:
        head.not_finite[rows] = ~losses.isfinite()
    if job.even_weight:
        losses = losses + job.even_weight * chunk.mean_log_probs()
    d_logits = chunk.gradient(slopes, job.z_weight, job.even_weight).to(h.dtype)
    del chunk
    sums.add(rows, leaf, h, d_logits, weight)
    return losses.sum()


class _Gradients:
    """Gradients of x, the head and the norm's parameters as chunks of rows add to them.

    x's gradient has x's dtype and, with `overwrite`, x's storage; a chunk is read before it is written. The others are sums in
    float32 (float64 for float64).
    """

    def __init__(self, x: Tensor, weight: Tensor | None, trained: Sequence[Tensor], *, needs_x: bool, overwrite: bool) -> None:
        wide = torch.promote_types(x.dtype, torch.float32)
        self._x, self._trained = x.detach(), list(trained)
        self._d_x: Tensor | None = None
        if needs_x:
            self._d_x = self._x if overwrite else torch.empty_like(x)
        self._d_weight = None if weight is None else torch.zeros_like(weight, dtype=wide)
        self._weight_dtype = None if weight is None else weight.dtype
        self._d_norm = [torch.zeros_like(p, dtype=wide) for p in self._trained]

    def normed(self, rows: Tensor, head: Head) -> tuple[Tensor, Tensor]:
        """The given rows of x, and `head.normed` of them with its graph from there."""
        leaf = self._x.index_select(0, rows)
        wanted = self._d_x is not None or bool(self._trained)
        with torch.set_grad_enabled(wanted):
            leaf.requires_grad_(wanted)
            return leaf, head.normed(leaf)

    def add(self, rows: Tensor, leaf: Tensor, h: Tensor, d_logits: Tensor, weight: Tensor) -> None:
        """Add the gradients of the given rows, from the gradient (C, V) of their logits h @ weight^T in h's dtype."""
        if self._d_weight is not None:
            self._d_weight += d_logits.T @ h.detach()
        if not leaf.requires_grad:
            return
        d_leaf, *d_norm = torch.autograd.grad(h, [leaf, *self._trained], d_logits @ weight)
        if self._d_x is not None:
            self._d_x[rows] = d_leaf
        for total, part in zip(self._d_norm, d_norm, strict=True):
            total += part

    def close(self, unused: Tensor) -> None:
        """Finish after the last chunk: rows `unused` (T,), bool, have no gradient. x is not needed any more."""
        if self._d_x is not None:
            self._d_x.masked_fill_(unused.unsqueeze(1), 0.0)
        del self._x

    def take(self, factor: Tensor) -> tuple[Tensor | None, Tensor | None, list[Tensor]]:
        """The gradients of x, the head and the norm's parameters, times `factor`, in the dtypes of what they belong to."""
        d_weight = None if self._d_weight is None else self._d_weight.mul_(factor).to(self._weight_dtype)
        d_norm = [total.mul_(factor).to(p.dtype) for total, p in zip(self._d_norm, self._trained, strict=True)]
        return None if self._d_x is None else self._d_x.mul_(factor), d_weight, d_norm


class _Chunk:
    """Log-probabilities of one chunk's targets from its raw logits (C, V), which become the gradient in place."""

    def __init__(self, logits: Tensor, targets: Tensor, softcap: float | None) -> None:
        self._bend: Tensor | None = None
        if softcap is not None:
            bent = (logits / softcap).tanh_()
            logits, self._bend = bent * softcap, 1 - bent * bent
        self._logits, self._targets = logits, targets.unsqueeze(1)
        self.normaliser = logits.logsumexp(-1)
        self.log_probs = logits.gather(1, self._targets).squeeze(1) - self.normaliser

    def mean_log_probs(self) -> Tensor:
        """Means (C,) of the log-probabilities of the whole vocabulary. Before `gradient`."""
        return self._logits.mean(-1) - self.normaliser

    def gradient(self, slopes: Tensor, z_weight: float, even_weight: float) -> Tensor:
        """The gradient of sum(slopes x log_probs + z_weight x normaliser^2 + even_weight x mean_log_probs) by the raw logits.

        (C, V), once: it takes their place.
        """
        gradient = self._logits.sub_(self.normaliser.unsqueeze(1)).exp_()
        gradient *= (2 * z_weight * self.normaliser - slopes - even_weight).unsqueeze(1)
        if even_weight:
            gradient += even_weight / gradient.shape[1]
        gradient.scatter_add_(1, self._targets, slopes.to(gradient.dtype).unsqueeze(1))
        return gradient if self._bend is None else gradient.mul_(self._bend)
