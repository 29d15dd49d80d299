"""Attention as blocks: which rows of the local queries meet which rows of some keys, and under what mask. Pure.

Rows are positions in the local (T, heads, dim) tensors; a slice's tokens are consecutive rows. A block is either
full (every query sees every key) or causal (square, its diagonal aligned), so flash kernels need no mask tensor;
`windowed` blocks additionally cross the edge of a sliding window.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from .layout import Slice, Slices


@dataclass(frozen=True, slots=True)
class Block:
    """Query rows [q_start, q_stop) against key rows [k_start, k_stop).

    `offset`: position of the first query minus position of the first key, in their sequence.
    """

    q_start: int
    q_stop: int
    k_start: int
    k_stop: int
    offset: int
    causal: bool
    windowed: bool

    @property
    def num_pairs(self) -> int:
        """Query-key pairs a causal kernel computes (windows not counted)."""
        rows, cols = self.q_stop - self.q_start, self.k_stop - self.k_start
        return rows * (rows + 1) // 2 if self.causal else rows * cols


Blocks = tuple[Block, ...]


def attention_blocks(q_slices: Slices, k_slices: Slices, window: int | None = None) -> Blocks:
    """Blocks of causal attention inside each sequence; `window` keeps keys with query - key < window."""
    out: list[Block] = []
    keys = list(_with_rows(k_slices))
    for q_row, q in _with_rows(q_slices):
        for k_row, k in keys:
            if k.sequence == q.sequence and k.start < q.stop:
                out.extend(_pair(q, q_row, k, k_row, window))
    return tuple(out)


def _with_rows(slices: Slices) -> Iterator[tuple[int, Slice]]:
    row = 0
    for piece in slices:
        yield row, piece
        row += len(piece)


def _pair(q: Slice, q_row: int, k: Slice, k_row: int, window: int | None) -> Iterator[Block]:
    def block(qa: int, qb: int, ka: int, kb: int, causal: bool) -> Iterator[Block]:
        if window is not None:
            ka = max(ka, qa - window + 1) if not causal else ka
        if qa < qb and ka < kb:
            windowed = window is not None and qb - 1 - ka >= window
            yield Block(q_row + qa - q.start, q_row + qb - q.start, k_row + ka - k.start, k_row + kb - k.start, qa - ka, causal, windowed)

    yield from block(q.start, q.stop, k.start, min(k.stop, q.start), False)
    # What is left of the keys starts at or after the first query: a square on the diagonal, then later queries see it whole.
    start, stop = max(k.start, q.start), min(k.stop, q.stop)
    if start < stop:
        yield from block(start, stop, start, stop, True)
        yield from block(stop, q.stop, start, stop, False)


def split_keys(blocks: Blocks, most: int, window: int | None) -> Blocks:
    """Splits blocks into ones of at most `most` keys each, so that one block's key gradients are small. Causal squares stay whole
    up to `most` rows; larger ones become smaller squares and the rectangles below them."""
    out: list[Block] = []
    for block in blocks:
        out.extend(_split(block, most, window))
    return tuple(out)


def _split(block: Block, most: int, window: int | None) -> Iterator[Block]:
    for start in range(block.k_start, block.k_stop, most):
        stop, row = min(start + most, block.k_stop), start - block.k_start
        if not block.causal:
            yield _part(block, block.q_start, block.q_stop, start, stop, False, window)
            continue
        first = block.q_start + row
        last = first + stop - start
        yield _part(block, first, last, start, stop, True, window)
        if last < block.q_stop:
            yield _part(block, last, block.q_stop, start, stop, False, window)


def _part(block: Block, q_start: int, q_stop: int, k_start: int, k_stop: int, causal: bool, window: int | None) -> Block:
    offset = block.offset + (q_start - block.q_start) - (k_start - block.k_start)
    windowed = window is not None and offset + (q_stop - q_start) - 1 >= window
    return Block(q_start, q_stop, k_start, k_stop, offset, causal, windowed)


def disjoint_queries(blocks: Blocks) -> bool:
    """True where no query row is in two blocks, so results need no merging."""
    ranges = sorted((block.q_start, block.q_stop) for block in blocks)
    return all(a[1] <= b[0] for a, b in zip(ranges, ranges[1:], strict=False))
