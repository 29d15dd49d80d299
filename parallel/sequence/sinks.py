"""Attention sinks: one learnt logit per query head joins the denominator of every row's softmax, and no value goes with it.

Legend: T query rows, H query heads, D head dim. With o and lse merged over all keys of a row, o' = o sigmoid(lse - sink) and
lse' = logaddexp(lse, sink) are those with the sink. So no block, hop of a ring or exchange knows of sinks. Backward of blocks reads o'
and lse' as it reads o and lse: a weight is exp(score - lse'), and a score's gradient is weight (dweight - delta), delta = do . o'.
The sink's own weight is exp(sink - lse') and its dweight is 0 (gpt-oss, 2508.10925; StreamingLLM, 2309.17453, without the learnt logit).
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

WIDENED_ROWS = 4096
"""Rows that are worked on in the accumulation dtype at one time: what that takes does not grow with the sequence."""


def join_sinks(o: Tensor, lse: Tensor, sinks: Tensor) -> None:
    """Let `sinks` (H,) join the softmax that made o (T, H, D) and lse (T, H), whose memory takes the result.

    Rows that saw no key stay 0.
    """
    wide = sinks.detach().to(lse.dtype)
    for rows in _chunks(lse.shape[0]):
        o[rows].mul_((lse[rows] - wide).sigmoid_().unsqueeze(-1))
        lse[rows] = lse[rows].logaddexp(wide)


def sink_gradient(do: Tensor, o: Tensor, lse: Tensor, sinks: Tensor) -> Tensor:
    """Gradient (H,) of `sinks` in the accumulation dtype, from the rows of o (T, H, D) and lse (T, H) that they have joined."""
    wide = sinks.detach().to(lse.dtype)
    total = lse.new_zeros(sinks.shape)
    for rows in _chunks(lse.shape[0]):
        delta = (do[rows].to(lse.dtype) * o[rows]).sum(-1)
        total -= (delta * (wide - lse[rows]).exp()).sum(0)
    return total


def _chunks(num_rows: int) -> Iterator[slice]:
    return (slice(start, start + WIDENED_ROWS) for start in range(0, num_rows, WIDENED_ROWS))
