"""Cross-entropy over a large vocabulary without ever holding the logits of more than one chunk of tokens.

Gradients are made chunk by chunk inside forward, while the chunk's logits exist; backward only hands them over. The
weight gradient is summed in float32 (float64 for float64). Tokens without a target cost nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

IGNORE = -100


@dataclass(frozen=True, slots=True)
class LossOptions:
    """`chunk_tokens`: tokens per chunk; `softcap`: logits become cap * tanh(logits / cap); `z_loss`: weight of logsumexp^2."""

    chunk_tokens: int
    softcap: float | None = None
    z_loss: float = 0.0


def chunked_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor, *, scale: float, options: LossOptions) -> Tensor:
    """scale x sum of token losses, a scalar in float32 (float64 for float64).

    hidden (T, M), head weight (V, M), targets (T,) with -100 where there is no loss. With scale = 1 / target tokens of the
    step, the sum over micro-batches and ranks is the mean loss. Peak: about 10 x V x chunk_tokens bytes in bfloat16.
    """
    return _ChunkedCrossEntropy.apply(hidden, weight, targets, scale, options)  # type: ignore[no-any-return]


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, scale: float, options: LossOptions) -> Tensor:
        wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        rows = (targets != IGNORE).nonzero().squeeze(1)
        d_hidden = torch.zeros_like(hidden) if ctx.needs_input_grad[0] else None
        d_weight = torch.zeros_like(weight, dtype=wide) if ctx.needs_input_grad[1] else None
        total = hidden.new_zeros((), dtype=wide)
        for picked in rows.split(options.chunk_tokens):
            h = hidden.index_select(0, picked)
            loss, d_logits = _chunk(F.linear(h, weight).to(wide), targets[picked], options)
            total += loss
            d_logits = d_logits.mul_(scale).to(hidden.dtype)
            if d_hidden is not None:
                d_hidden[picked] = d_logits @ weight
            if d_weight is not None:
                d_weight += d_logits.T @ h
        ctx.save_for_backward(*(t for t in (d_hidden, d_weight) if t is not None))
        ctx.weight_dtype = weight.dtype
        return total * scale

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        saved = list(ctx.saved_tensors)
        d_hidden = saved.pop(0).mul_(upstream) if ctx.needs_input_grad[0] else None
        d_weight = saved.pop(0).mul_(upstream).to(ctx.weight_dtype) if ctx.needs_input_grad[1] else None
        return d_hidden, d_weight, None, None, None


def _chunk(logits: Tensor, targets: Tensor, options: LossOptions) -> tuple[Tensor, Tensor]:
    """Sum of the chunk's losses, and its gradient with respect to the raw logits (C, V), written over them."""
    slope = None
    if options.softcap is not None:
        bent = (logits / options.softcap).tanh_()
        logits, slope = bent * options.softcap, 1 - bent * bent
    normaliser = logits.logsumexp(-1)
    loss = (normaliser - logits.gather(1, targets.unsqueeze(1)).squeeze(1)).sum()
    gradient = logits.sub_(normaliser.unsqueeze(1)).exp_()
    if options.z_loss:
        loss = loss + options.z_loss * (normaliser * normaliser).sum()
        gradient *= (1 + 2 * options.z_loss * normaliser).unsqueeze(1)
    gradient.scatter_add_(1, targets.unsqueeze(1), gradient.new_full((len(targets), 1), -1.0))
    return loss, gradient if slope is None else gradient.mul_(slope)
