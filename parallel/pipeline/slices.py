"""Where a micro-batch is cut into slices that take equally long: later tokens attend to more, so later slices have fewer. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

from ...errors import PlanError


def slice_work(documents: Sequence[int], sizes: Sequence[int], token_work: float, pair_work: float) -> list[float]:
    """Work of each slice of `sizes` tokens: `token_work` a token and `pair_work` for each query-key pair of causal attention.

    `documents`: tokens of each document of the micro-batch, end to end; a token attends to its own document only.
    """
    bounds = [0, *accumulate(sizes)]
    upto = [_work_before(documents, bound, token_work, pair_work) for bound in bounds]
    return [after - before for before, after in zip(upto, upto[1:], strict=False)]


def balanced_slices(documents: Sequence[int], slices: int, *, token_work: float, pair_work: float, granule: int = 1) -> tuple[int, ...]:
    """Tokens of each slice, such that the slowest is as fast as can be: cuts at multiples of `granule` tokens only.

    Every slice has tokens. Seq1F1B (arXiv 2406.03488, section 3.4) balances floating-point operations in the same way. PlanError for
    more slices than granules, or work that is negative or none.
    """
    tokens = sum(documents)
    granules = -(-tokens // granule) if granule > 0 else 0
    if not 1 <= slices <= granules or min(token_work, pair_work) < 0 or token_work + pair_work <= 0:
        found = f"{slices} slices of {tokens} tokens in multiples of {granule}, work {token_work} a token and {pair_work} a pair"
        raise PlanError("pipeline slices", found=found, expected="1 slice or more with tokens and work in each", hint="fewer slices")
    before = [_work_before(documents, min(place * granule, tokens), token_work, pair_work) for place in range(granules + 1)]
    low, high = before[-1] / slices, before[-1]
    best = _cuts(before, slices, high)
    assert best is not None
    # Work is a sum of floating-point numbers: 60 halvings reach its last digit.
    for _ in range(60):
        middle = (low + high) / 2
        cuts = _cuts(before, slices, middle)
        if cuts is None:
            low = middle
        else:
            high, best = middle, cuts
    bounds = [min(place * granule, tokens) for place in best]
    return tuple(stop - start for start, stop in zip(bounds, bounds[1:], strict=False))


def _cuts(before: Sequence[float], slices: int, most: float) -> list[int] | None:
    """Bounds of slices that take at most `most` each, filled from the first on; None: there are none."""
    cuts, last = [0], len(before) - 1
    for left in range(slices - 1, -1, -1):
        start = cuts[-1]
        if before[start + 1] - before[start] > most:
            return None
        stop = _last_within(before, start, most)
        # One granule at least for each slice that follows.
        cuts.append(min(stop, last - left))
    return cuts if cuts[-1] == last else None


def _last_within(before: Sequence[float], start: int, most: float) -> int:
    low, high = start + 1, len(before) - 1
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if before[middle] - before[start] <= most else (low, middle - 1)
    return low


def _work_before(documents: Sequence[int], bound: int, token_work: float, pair_work: float) -> float:
    """Work of the first `bound` tokens."""
    work, left = token_work * bound, bound
    for length in documents:
        inside = min(length, left)
        work += pair_work * inside * (inside + 1) / 2
        left -= inside
    return work
