"""Which rows of a rank a layer works on at a time. Pure.

Rows are cut by chunks and wherever a class of activations changes its place (policy.Split), so that every piece of a class
is either kept, moved or recomputed as a whole.
"""

from __future__ import annotations

from functools import lru_cache
from itertools import pairwise

from .config import ActivationPlace
from .policy import MemoryPolicy, Split

Range = tuple[int, int]


@lru_cache(maxsize=64)  # asked for by every layer of a micro-batch
def group_ranges(tokens: tuple[int, ...], policy: MemoryPolicy) -> tuple[tuple[Range, ...], ...]:
    """The pieces in ascending order, each with every member's rows [start, stop); `tokens` are the members' row counts.

    All members have the same number of pieces, for they exchange once a piece; one may be empty for some of them, not for all.
    With no rows at all there is one empty piece.
    """
    chunk = policy.chunk_tokens
    num_chunks = 1 if chunk is None else max(1, -(-max(tokens) // chunk))
    pieces = list(zip(*(tuple(pairwise(_cuts(count, num_chunks, policy))) for count in tokens), strict=True))
    return tuple([piece for piece in pieces if any(start < stop for start, stop in piece)] or pieces[:1])


def _cuts(num_tokens: int, num_chunks: int, policy: MemoryPolicy) -> list[int]:
    """Rows where pieces begin and end, as many for any number of tokens: two may be equal."""
    chunk = policy.chunk_tokens or num_tokens
    grid = [min(index * chunk, num_tokens) for index in range(num_chunks)]
    changes = [row for split in policy.splits.values() for row in split.rows(num_tokens)]
    return sorted([*grid, *changes, 0, num_tokens])


def place_of(split: Split, rows: Range, num_tokens: int) -> ActivationPlace:
    """Where the rows of one piece are. What is complete is stored and what is not is not, on a rank that has none of them too:
    whether attention is recomputed, and with it the group's exchanges, must not differ between ranks."""
    if rows[0] == rows[1]:
        return ActivationPlace.KEEP if split.complete else ActivationPlace.RECOMPUTE
    kept, moved = split.rows(num_tokens)
    if rows[1] <= kept:
        return ActivationPlace.KEEP
    return ActivationPlace.HOST if rows[1] <= moved else ActivationPlace.RECOMPUTE
