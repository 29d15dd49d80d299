"""Where a micro-batch is cut into slices that take equally long: later tokens attend to more, so later slices have fewer. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import numpy as np
from numpy.typing import NDArray

from ...errors import PlanError

Floats = NDArray[np.float64]


def slice_work(documents: Sequence[int], sizes: Sequence[int], token_work: float, pair_work: float) -> list[float]:
    """Work of each slice of `sizes` tokens: `token_work` a token and `pair_work` for each query-key pair of causal attention.

    `documents`: tokens of each document of the micro-batch, end to end; a token attends to its own document only.
    """
    upto = _work_before(documents, np.array([0, *accumulate(sizes)]), token_work, pair_work)
    return [float(work) for work in np.diff(upto)]


def balanced_slices(documents: Sequence[int], slices: int, *, token_work: float, pair_work: float, granule: int = 1) -> tuple[int, ...]:
    """Tokens of each slice, such that the slowest is as fast as can be: cuts at multiples of `granule` tokens only.

    Every slice has tokens. Seq1F1B (arXiv 2406.03488) balances floating-point operations in the same way. PlanError for
    more slices than granules, or work that is negative or none.
    """
    tokens = sum(documents)
    granules = -(-tokens // granule) if granule > 0 else 0
    if not 1 <= slices <= granules or min(token_work, pair_work) < 0 or token_work + pair_work <= 0:
        found = f"{slices} slices of {tokens} tokens in multiples of {granule}, work {token_work} a token and {pair_work} a pair"
        raise PlanError("pipeline slices", found=found, expected="1 slice or more with tokens and work in each", hint="fewer slices")
    if slices == 1:
        return (tokens,)
    bounds = np.minimum(np.arange(granules + 1) * granule, tokens)
    before = _work_before(documents, bounds, token_work, pair_work)
    low, high = float(before[-1]) / slices, float(before[-1])
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
    return tuple(int(size) for size in np.diff(bounds[best]))


def _cuts(before: Floats, slices: int, most: float) -> list[int] | None:
    """Bounds of slices that take at most `most` each, filled from the first on; None: there are none."""
    cuts, last = [0], len(before) - 1
    for left in range(slices - 1, -1, -1):
        start = cuts[-1]
        stop = int(np.searchsorted(before, before[start] + most, side="right")) - 1
        if stop <= start:
            return None
        # One granule at least for each slice that follows.
        cuts.append(min(stop, last - left))
    return cuts if cuts[-1] == last else None


def _work_before(documents: Sequence[int], bounds: NDArray[np.int64], token_work: float, pair_work: float) -> Floats:
    """Work of the tokens before each bound."""
    starts = np.array([0, *accumulate(documents)])
    lengths = np.diff(starts).astype(np.float64)
    pairs = np.concatenate([[0.0], np.cumsum(lengths * (lengths + 1) / 2)])
    # Whole documents before a bound, and the part of the one that it cuts.
    whole = np.searchsorted(starts, bounds, side="right") - 1
    inside = (bounds - starts[whole]).astype(np.float64)
    return token_work * bounds.astype(np.float64) + pair_work * (pairs[whole] + inside * (inside + 1) / 2)
