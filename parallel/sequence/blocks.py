"""Attention as blocks: which rows of the local queries meet which rows of some keys, and under what mask. Pure.

Rows are positions in the local (T, heads, dim) tensors; a slice's tokens are consecutive rows. A block is either
full (every query sees every key) or causal (square, its diagonal aligned), so flash kernels need no mask tensor;
`windowed` blocks additionally cross the edge of a sliding window. Causal blocks whose rows follow each other, as those of whole
documents do, are joined into `Documents`: one call of a kernel for variable lengths.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

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


@dataclass(frozen=True, slots=True)
class Documents:
    """Two or more causal blocks whose rows follow each other, queries and keys alike: documents of one call.

    `cuts`: where each starts, counted from the first row, and at last where the last one stops.
    """

    q_start: int
    k_start: int
    cuts: tuple[int, ...]
    windowed: bool
    on_device: dict[Any, Any] = field(default_factory=dict, compare=False, repr=False)
    """What kernels made of the cuts, by device: once for all layers that walk these blocks."""

    @property
    def q_stop(self) -> int:
        return self.q_start + self.cuts[-1]

    @property
    def k_stop(self) -> int:
        return self.k_start + self.cuts[-1]

    @property
    def count(self) -> int:
        return len(self.cuts) - 1

    @property
    def longest(self) -> int:
        """Rows of the longest document."""
        return max(b - a for a, b in pairwise(self.cuts))

    def each(self, window: int | None) -> Iterator[Block]:
        """The documents as blocks, rows counted from the first of all."""
        for a, b in pairwise(self.cuts):
            yield Block(a, b, a, b, 0, True, window is not None and b - 1 - a >= window)


Calls = tuple[Block | Documents, ...]
"""Blocks as kernels are called for them."""


def attention_blocks(q_slices: Slices, k_slices: Slices, window: int | None = None) -> Blocks:
    """Blocks of causal attention inside each sequence; `window` keeps keys with query - key < window."""
    out: list[Block] = []
    keys: dict[int, list[tuple[int, Slice]]] = {}  # by sequence: a pack has thousands
    for k_row, k in _with_rows(k_slices):
        keys.setdefault(k.sequence, []).append((k_row, k))
    for q_row, q in _with_rows(q_slices):
        for k_row, k in keys.get(q.sequence, ()):
            if k.start < q.stop:
                out.extend(_pair(q, q_row, k, k_row, window))
    return tuple(out)


def _with_rows(slices: Slices) -> Iterator[tuple[int, Slice]]:
    row = 0
    for piece in slices:
        yield row, piece
        row += len(piece)


def _pair(q: Slice, q_row: int, k: Slice, k_row: int, window: int | None) -> Iterator[Block]:
    def block(qa: int, qb: int, ka: int, kb: int, causal: bool) -> Iterator[Block]:
        if window is not None and not causal:
            # Neither keys that no query sees nor queries that see no key.
            ka, qb = max(ka, qa - window + 1), min(qb, kb - 1 + window)
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
    return (part for part in _parts(block, most, window) if part.q_start < part.q_stop)


def _parts(block: Block, most: int, window: int | None) -> Iterator[Block]:
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
    if window is not None and not causal:
        # No query that sees none of these keys.
        q_stop = max(q_start, min(q_stop, q_start + window - offset + k_stop - k_start - 1))
    windowed = window is not None and offset + (q_stop - q_start) - 1 >= window
    return Block(q_start, q_stop, k_start, k_stop, offset, causal, windowed)


def join_documents(blocks: Blocks, most: int | None = None, pads: int = 0) -> Calls:
    """`blocks` with runs of causal ones joined, of at most `most` keys a run: first those, in the order of their rows, then the others.

    `pads`: rows that a kernel's workspace has more for each document of a call. Up to half as many rows as there are, one call has
    them all; beyond, calls are cut so that each one's workspace is no larger than that of as many rows without a pad.
    Sums over blocks do not depend on their order but for rounding.
    """
    squares = sorted((block for block in blocks if block.causal), key=lambda block: (block.q_start, block.k_start))
    total = sum(block.q_stop - block.q_start for block in squares)
    cut = 2 * pads * len(squares) > total
    runs: list[list[Block]] = []
    for block in squares:
        run = runs[-1] if runs else None
        if run is not None and _follows(run, block, most) and not (cut and _rows(run, block) + pads * (len(run) + 1) > total):
            run.append(block)
        else:
            runs.append([block])
    return (*map(_joined, runs), *(block for block in blocks if not block.causal))


def _follows(run: list[Block], block: Block, most: int | None) -> bool:
    """Whether `block` can join a run: its rows come next, and the keys stay within `most`."""
    is_next = (run[-1].q_stop, run[-1].k_stop) == (block.q_start, block.k_start)
    return is_next and (most is None or _rows(run, block) <= most)


def _rows(run: list[Block], block: Block) -> int:
    return block.k_stop - run[0].k_start


def _joined(run: list[Block]) -> Block | Documents:
    first = run[0]
    if len(run) == 1:
        return first
    cuts = (0, *(block.q_stop - first.q_start for block in run))
    return Documents(first.q_start, first.k_start, cuts, any(block.windowed for block in run))


def disjoint_queries(blocks: Calls) -> bool:
    """True where no query row is in two blocks, so results need no merging."""
    ranges = sorted((block.q_start, block.q_stop) for block in blocks)
    return all(a[1] <= b[0] for a, b in zip(ranges, ranges[1:], strict=False))
