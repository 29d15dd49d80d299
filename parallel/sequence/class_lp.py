"""The class program: a relaxation of planning in which shelves are counted by classes of duration. Its optimum is a lower bound.

Variables, for duration classes j = (theta[j], theta[j+1]], degrees d and buckets b of sequences of like length:
    y[j] shelves, T[j] their total duration, g[j, d] groups, L[j, d] their total load, z[b, j, d] sequences.
A bucket counts as so many of its cheapest sequence: the fewest tokens and the least seconds under each degree, whichever member
has them. So nothing is assumed of how cost grows. Every inequality below holds for every plan faster than `limit_s`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from .staircase_bound import leads
from .tables import Batch

EPSILON = 1e-9


@dataclass(frozen=True, slots=True)
class Effort:
    """How fine the program is: sequences kept alone, ratio of lengths within a bucket, ratio of durations within a class."""

    alone: int
    bucket_ratio: float
    class_ratio: float
    cuts: int
    """Dual-feasible functions per class and degree, of tokens and of time."""


@dataclass(frozen=True, slots=True)
class Buckets:
    """Sorted sequences in runs: sizes, fewest tokens, least seconds per degree (inf where memory forbids), rounding to give back."""

    counts: np.ndarray
    tokens: np.ndarray
    times: np.ndarray
    residual: float
    """Rank-seconds that counting each sequence as its bucket's cheapest leaves out, whatever degrees are chosen."""


def make_buckets(batch: Batch, effort: Effort) -> Buckets:
    """The longest sequences alone, then runs whose lengths differ by at most a ratio and that the same degrees can hold."""
    lengths, first = batch.lengths, batch.first
    starts, start = [], 0
    while start < len(lengths):
        starts.append(start)
        ratio = 1.0 if start < effort.alone else effort.bucket_ratio
        stop = int(np.searchsorted(-lengths, -lengths[start] / ratio, side="right"))
        start = _stop(first, start, max(stop, start + 1))
    at = np.array(starts)
    times = np.minimum.reduceat(batch.times, at, axis=0)
    tokens = np.minimum.reduceat(lengths, at)
    counts = np.diff(np.append(at, len(lengths)))
    spare = ((batch.times - np.repeat(times, counts, axis=0)) * batch.degrees).copy()
    spare[np.arange(len(batch.degrees)) < first[:, None]] = np.inf
    return Buckets(counts, tokens, np.where(tokens[:, None] <= batch.capacity, times, np.inf), float(spare.min(axis=1).sum()))


def _stop(first: np.ndarray, start: int, stop: int) -> int:
    """The end of a run that does not cross from one smallest degree to another."""
    other = np.flatnonzero(first[start:stop] != first[start])
    return start + int(other[0]) if len(other) else stop


def make_classes(batch: Batch, limit_s: float, effort: Effort) -> np.ndarray:
    """theta: ascending edges from the least to the longest duration a shelf of a plan faster than `limit_s` can have.

    Edges stand just below the fastest times of the sequences that start a new shelf, and below the longest one's time under each
    degree, so that a class either allows them or not; between, a geometric grid.
    """
    floor, shelves = batch.cost.gather_s, batch.num_shelves
    steps = leads(batch.lengths.astype(np.float64), batch.fastest, float(batch.cost.world_size * batch.cost.tokens_per_rank), shelves)
    longest = limit_s - shelves * batch.cost.beta_s - float(np.maximum(steps[1:], floor).sum())
    mean = float(batch.work.sum()) / batch.cost.world_size / max(1, shelves)
    low = min(max(floor, 0.2 * mean), longest / 1.01)
    grid = low * (longest / low) ** np.linspace(0, 1, 1 + max(1, round(np.log(longest / low) / np.log(effort.class_ratio))))
    sharp = np.concatenate([np.unique(steps[:12]), batch.times[0, int(batch.first[0]) :]]) * (1 - EPSILON)
    sharp = np.unique(sharp[(sharp > floor) & (sharp < longest)])
    near = np.array([np.any(np.abs(sharp / edge - 1) < 0.02) for edge in grid[:-1]], dtype=bool)
    inner = np.unique(np.concatenate([grid[:-1][~near & (grid[:-1] > floor)], sharp]))
    return np.concatenate([[floor], inner, [longest * (1 + EPSILON)]])


class Rows:
    """Inequalities low <= A x <= high, collected piece by piece."""

    def __init__(self) -> None:
        self.count = 0
        self.entries: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
        self.low: list[np.ndarray] = []
        self.high: list[np.ndarray] = []

    def add(self, num: int, low: Any, high: Any, *parts: tuple[Any, Any, Any]) -> None:
        """`num` rows; each part is (row of each entry, from 0; column; value), broadcast together."""
        for row, column, value in parts:
            shaped = np.broadcast_arrays(np.asarray(row) + self.count, column, np.asarray(value, dtype=np.float64))
            self.entries.append(tuple(part.ravel() for part in shaped))  # type: ignore[arg-type]
        self.low.append(np.broadcast_to(np.asarray(low, dtype=np.float64), (num,)))
        self.high.append(np.broadcast_to(np.asarray(high, dtype=np.float64), (num,)))
        self.count += num


class ClassProgram:
    """The inequalities over one numbering of the variables."""

    def __init__(self, batch: Batch, limit_s: float, effort: Effort) -> None:
        self.batch, self.effort = batch, effort
        self.buckets = make_buckets(batch, effort)
        self.theta = make_classes(batch, limit_s, effort)
        self.num_classes, self.num_degrees = len(self.theta) - 1, len(batch.degrees)
        classes, pairs = self.num_classes, self.num_classes * self.num_degrees
        self.y, self.total = np.arange(classes), classes + np.arange(classes)
        self.g = (2 * classes + np.arange(pairs)).reshape(classes, self.num_degrees)
        self.load = self.g + pairs
        fits = self.buckets.times[:, None, :] <= self.theta[None, 1:, None]
        self.zb, self.zj, self.zd = np.nonzero(fits)
        self.z = 2 * classes + 2 * pairs + np.arange(len(self.zb))
        self.num_variables = 2 * classes + 2 * pairs + len(self.zb)
        self.z_time, self.z_tokens = self.buckets.times[self.zb, self.zd], self.buckets.tokens[self.zb].astype(np.float64)
        self.rows = Rows()
        for add in (self._every_sequence, self._shelves, self._groups, self._cuts, self._totals, self._stairs):
            add()

    @property
    def cost(self) -> np.ndarray:
        """Seconds: beta for every shelf, and durations."""
        cost = np.zeros(self.num_variables)
        cost[self.y], cost[self.total] = self.batch.cost.beta_s, 1.0
        return cost

    def _every_sequence(self) -> None:
        # sum over j, d of z[b, j, d] = count[b]: every sequence is in one group.
        self.rows.add(len(self.buckets.counts), self.buckets.counts, self.buckets.counts, (self.zb, self.z, 1.0))

    def _shelves(self) -> None:
        """Durations are of their class; groups of a class fit beside and after one another on its shelves."""
        n, ranks, degrees = np.arange(self.num_classes), float(self.batch.cost.world_size), self.batch.degrees
        # T[j] >= theta[j] y[j]: a shelf of the class lasts at least its lower edge.
        self.rows.add(len(n), 0, np.inf, (n, self.total, 1.0), (n, self.y, -self.theta[:-1]))
        # T[j] <= theta[j + 1] y[j]: and at most its upper one.
        self.rows.add(len(n), -np.inf, 0, (n, self.total, 1.0), (n, self.y, -self.theta[1:]))
        # sum over d of degree[d] g[j, d] <= ranks y[j]: groups of a shelf run side by side.
        self.rows.add(len(n), -np.inf, 0, (n[:, None], self.g, degrees), (n, self.y, -ranks))
        # sum over d of degree[d] L[j, d] <= ranks T[j]: no rank is busy for longer than its shelves last.
        self.rows.add(len(n), -np.inf, 0, (n[:, None], self.load, degrees), (n, self.total, -ranks))

    def _groups(self) -> None:
        """Groups hold what is in them, in time and in tokens."""
        pair = np.arange(self.g.size)
        g, load, of = self.g.ravel(), self.load.ravel(), self.zj * self.num_degrees + self.zd
        longest = np.repeat(self.theta[1:], self.num_degrees)
        capacity = np.tile(self.batch.capacity, self.num_classes)
        # L[j, d] <= theta[j + 1] g[j, d]: no group outlasts its class.
        self.rows.add(len(pair), -np.inf, 0, (pair, load, 1.0), (pair, g, -longest))
        # sum over b of time[b, d] z[b, j, d] <= L[j, d]: a group's load is that of its sequences, or more.
        self.rows.add(len(pair), -np.inf, 0, (of, self.z, self.z_time), (pair, load, -1.0))
        # sum over b of tokens[b] z[b, j, d] <= capacity[d] g[j, d]: what a group's memory holds.
        self.rows.add(len(pair), -np.inf, 0, (of, self.z, self.z_tokens), (pair, g, -capacity))

    def _cuts(self) -> None:
        """Dual-feasible functions: of tokens alone or of time alone, never of both in one row, which would not hold."""
        pair, of = np.arange(self.g.size), self.zj * self.num_degrees + self.zd
        shares = (self.z_tokens / self.batch.capacity[self.zd], self.z_time / self.theta[1:][self.zj])
        for share in shares:
            for k in range(1, self.effort.cuts + 1):
                # sum over b of f_k(share) z[b, j, d] <= g[j, d], f_k(s) = floor((k + 1) s) / k: shares of one group add up to at
                # most 1, and so do their images. Epsilon rounds down, which weakens the row and keeps it true.
                part = np.clip(np.floor((k + 1) * share - EPSILON) / k, 0.0, 1.0)
                some = part > 0
                used = np.unique(of[some])
                row = np.searchsorted(used, of[some])
                self.rows.add(
                    len(used), -np.inf, 0, (row, self.z[some], part[some]), (np.arange(len(used)), self.g.ravel()[pair[used]], -1.0)
                )

    def _totals(self) -> None:
        """Exact sums over everything: work with what rounding left out, tokens, and shelves."""
        batch, zero_j = self.batch, np.zeros_like(self.g)
        degrees = batch.degrees.astype(np.float64)
        work = (np.zeros_like(self.z), self.z, -degrees[self.zd] * self.z_time)
        # sum of degree L >= sum of degree time z + residual: work, with what bucketing left out.
        self.rows.add(1, self.buckets.residual, np.inf, (zero_j, self.load, degrees), work)
        # sum of capacity g >= all tokens, exact where buckets count the fewest of each.
        self.rows.add(1, float(batch.lengths.sum()), np.inf, (zero_j, self.g, batch.capacity))
        # sum over j of y[j] >= num_shelves, the fewest that hold all tokens.
        self.rows.add(1, batch.num_shelves, np.inf, (np.zeros_like(self.y), self.y, 1.0))

    def _stairs(self) -> None:
        """Sequences that no shelf as short as theta[j] can take need so many shelves of longer classes."""
        batch, room = self.batch, float(self.batch.cost.world_size * self.batch.cost.tokens_per_rank)
        for j in range(1, self.num_classes):
            tokens = float(batch.lengths[batch.fastest > self.theta[j]].sum())
            if tokens > 0:
                # sum over i >= j of y[i] >= ceil(their tokens / what a shelf holds); epsilon so that a whole number stays one.
                self.rows.add(1, np.ceil(tokens / room - EPSILON), np.inf, (np.zeros(self.num_classes - j, int), self.y[j:], 1.0))


def solve_program(program: ClassProgram, *, integer: bool, time_limit_s: float, floor_s: float) -> float | None:
    """The best bound HiGHS proves in the time, without step_s: None where it proves nothing, inf where no plan is below the limit."""
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import csr_array

    rows = program.rows
    # beta sum of y + sum of T >= floor_s: a bound that is proven already, below which nothing need be searched.
    rows.add(
        1,
        floor_s,
        np.inf,
        (np.zeros(2 * program.num_classes, int), np.concatenate([program.y, program.total]), program.cost[: 2 * program.num_classes]),
    )
    row, column, value = (np.concatenate([entry[i] for entry in rows.entries]) for i in range(3))
    matrix = csr_array((value, (row, column)), shape=(rows.count, program.num_variables))
    integrality = np.zeros(program.num_variables)
    integrality[program.y] = integer
    result = milp(
        program.cost,
        integrality=integrality,
        bounds=Bounds(0, np.inf),
        constraints=LinearConstraint(matrix, np.concatenate(rows.low), np.concatenate(rows.high)),
        options={"time_limit": time_limit_s, "mip_rel_gap": 1e-3, "presolve": True},
    )
    if result.status == 2:
        return float("inf")
    if integer:
        proved = result.mip_dual_bound
        return float(proved) if proved is not None and np.isfinite(proved) else None
    return float(result.fun) if result.status == 0 else None
