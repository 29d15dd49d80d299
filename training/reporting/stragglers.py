"""Finds ranks that are steadily slower than their plans predict, relative to the others. Pure.

Plans give ranks unequal work on purpose, so times are not compared with each other but each with its prediction: a rank's own
compute (no waits: BusyClock.own_seconds) against the modelled compute of the groups it was in. The model may be off in known ways:
by a factor, by the split between attention and the rest, differently for each group degree. All of that is fitted away first, on all ranks
together, by least squares of relative errors, held to one factor for everything by a prior. What is left of a rank's time over
its fitted prediction is compared with the median rank's.

One window of steps is an accident (a page cache, a neighbour on the node); a rank is named after `ENOUGH` of the last `WINDOWS`
windows, and no longer once it was fast in as many.
"""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from ...parallel.sequence.cost import CostModel
from ...parallel.sequence.plan import StepPlan

WINDOW = 8
"""Steps."""
WINDOWS = 5
ENOUGH = 4
SLOW = 1.25
"""Times the median rank's time over its prediction."""
LEAST_SHARE = 0.1
"""A rank with less work than this share of the median rank's is not judged by the window."""
PRIOR = 1.0
_WARM_UP = 2
"""Steps of an attempt that are no evidence."""
_LEAST_MULTIPLIER = 0.1


@dataclass(frozen=True, slots=True)
class Straggler:
    """A slow rank, over the windows that speak against it."""

    rank: int
    ratio: float
    """The rank's time over its prediction, divided by the median rank's; the median of its slow windows."""


class Stragglers:
    """Everything measured of one attempt against one cost model."""

    def __init__(self, cost: CostModel) -> None:
        self._cost = cost
        self._degrees = {degree.degree: index for index, degree in enumerate(cost.degrees)}
        self._seen = 0
        self._modelled: list[np.ndarray] = []
        self._measured: list[Sequence[float]] = []
        self._windows: deque[dict[int, float]] = deque(maxlen=WINDOWS)
        self._named: frozenset[int] = frozenset()

    def add(self, plan: StepPlan, own_s: Sequence[float]) -> list[Straggler] | None:
        """Add a step that ran by `plan`; `own_s[rank]`. Returns all stragglers where some came or went, else None."""
        self._seen += 1
        if self._seen <= _WARM_UP or plan.world_size < 2:
            return None
        self._modelled.append(modelled_s(plan, self._cost, self._degrees))
        self._measured.append(own_s)
        if len(self._measured) < WINDOW:
            return None
        self._windows.append(slowness(np.stack(self._modelled), np.asarray(self._measured, dtype=np.float64)))
        self._modelled, self._measured = [], []
        return self._news()

    def _news(self) -> list[Straggler] | None:
        ranks = {rank for window in self._windows for rank in window}
        now = [straggler for rank in sorted(ranks) if (straggler := self._judge(rank)) is not None]
        named = frozenset(straggler.rank for straggler in now)
        changed, self._named = named != self._named, named
        return now if changed else None

    def _judge(self, rank: int) -> Straggler | None:
        ratios = [window[rank] for window in self._windows if rank in window]
        slow = [ratio for ratio in ratios if ratio > SLOW]
        # Once named, a rank stays so until most windows speak for it: it is not reported again and again at the border.
        needed = ENOUGH if rank not in self._named else WINDOWS - ENOUGH + 1
        return Straggler(rank, statistics.median(slow)) if len(slow) >= needed else None


class StageStragglers:
    """The stragglers of each stage of a pipeline, whose ranks have like work; ranks are those of the run."""

    def __init__(self, cost: CostModel, num_stages: int) -> None:
        self._stages = [Stragglers(cost) for _ in range(num_stages)]
        self._slow: list[list[Straggler]] = [[] for _ in range(num_stages)]

    def add(self, plan: StepPlan, own_s: Sequence[float]) -> list[Straggler] | None:
        """Add a step that ran by `plan`, with seconds by rank. Returns all stragglers where some came or went, else None."""
        size, changed = plan.world_size, False
        for index, stage in enumerate(self._stages):
            slow = stage.add(plan, own_s[index * size : (index + 1) * size])
            if slow is not None:
                changed, self._slow[index] = True, [replace(one, rank=index * size + one.rank) for one in slow]
        return [one for slow in self._slow for one in slow] if changed else None


def modelled_s(plan: StepPlan, cost: CostModel, degrees: dict[int, int]) -> np.ndarray:
    """Modelled own seconds (ranks, degrees, 2) of attention and of the rest, by group degree; without communication."""
    out = np.zeros((plan.world_size, len(degrees), 2))
    for batch in plan.micro_batches:
        for group in batch.groups:
            rates, lengths = cost.of(group.degree), np.asarray([plan.lengths[i] for i in group.sequences], dtype=np.float64)
            linear_s = float(lengths.sum()) * rates.linear_s
            # Without hops to hide, the model's attention is all attention.
            attention_s = float(np.sum(rates.attention_s * lengths * lengths))
            for window, pair_s in rates.windowed_s:
                attention_s += float(np.sum(pair_s * np.where(lengths <= window, lengths * lengths / 2, window * (lengths - window / 2))))
            members = slice(group.first_rank, group.first_rank + group.degree)
            out[members, degrees[group.degree]] += (attention_s, linear_s)
    return out


def slowness(modelled: np.ndarray, measured: np.ndarray) -> dict[int, float]:
    """Slowness of each rank with enough work: its seconds over its fitted prediction, divided by the median rank's.

    `modelled` (steps, ranks, degrees, 2), `measured` (steps, ranks). The lower median: of two ranks the faster one is the measure.
    """
    features = modelled.reshape(*measured.shape, -1)
    totals = features.sum(-1)
    rows = (totals > 0) & (measured > 0)
    if not rows.any():
        return {}
    scale = float(np.median(measured[rows] / totals[rows]))
    predicted = (features * scale) @ _multipliers(features[rows] * scale / measured[rows][:, None])
    worked, spent = np.where(rows, predicted, 0.0).sum(0), np.where(rows, measured, 0.0).sum(0)
    enough = worked > LEAST_SHARE * np.median(worked)
    ratios = {int(rank): float(spent[rank] / worked[rank]) for rank in np.flatnonzero(enough)}
    middle = statistics.median_low(ratios.values())
    return {rank: ratio / middle for rank, ratio in ratios.items()}


def _multipliers(shares: np.ndarray) -> np.ndarray:
    """Multipliers (features,): least squares of shares @ m = 1, held to 1 by a prior worth PRIOR rows."""
    count = shares.shape[1]
    normal = shares.T @ shares + PRIOR * np.eye(count)
    return np.maximum(_LEAST_MULTIPLIER, np.linalg.solve(normal, shares.sum(0) + PRIOR))
