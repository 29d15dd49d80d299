"""FlexSP's planner (arXiv 2412.01523), reimplemented from the paper to compare plans with.

Bucketing by dynamic programming, "blaster" cuts into micro-batches, one mixed-integer program per micro-batch. Differences: HiGHS
through scipy instead of SCIP. scipy passes no starting solution, so the homogeneous warm starts are given as an upper limit on the
objective, and the best of them stands where HiGHS finds nothing better in its time. Groups of one rank are allowed, as in the paper's
tables. Sequences are not padded.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ...errors import PlanError
from .cost import CostModel, check_lengths
from .plan import Group, MicroBatch, StepPlan


@dataclass(frozen=True, slots=True)
class FlexspResult:
    """The best plan over the numbers of micro-batches tried, and what it took."""

    plan: StepPlan
    wall_s: float
    programs: int
    timeouts: int
    from_warm_start: int
    """Programs in which HiGHS found nothing better than the warm start."""


def flexsp_plan(lengths: Sequence[int], cost: CostModel, *, time_limit_s: float = 10.0, tries: int = 3, buckets: int = 16) -> FlexspResult:
    """Micro-batch counts from the fewest on, `tries` of them; PlanError where none works or a sequence fits no group."""
    check_lengths(lengths, cost)
    started = time.perf_counter()
    order = np.argsort(-np.asarray(lengths, dtype=np.int64), kind="stable")
    ordered = np.asarray(lengths, dtype=np.int64)[order]
    fewest = _fewest(ordered, cost)
    best: StepPlan | None = None
    solved: list[_Solved] = []
    for count in range(fewest, fewest + tries):
        batches = []
        for part in blaster(ordered, count):
            solved_batch = solve_micro_batch(ordered[part], cost, time_limit_s=time_limit_s, buckets=buckets)
            if solved_batch is None:
                break
            solved.append(solved_batch)
            batches.append(_placed(solved_batch.groups, order[part], cost))
        else:
            plan = cost.priced(StepPlan(cost.world_size, tuple(int(s) for s in lengths), tuple(batches), source="FlexSP"))
            best = plan if best is None or cost.plan_s(plan) < cost.plan_s(best) else best
    if best is None:
        raise PlanError(
            "FlexSP's planner",
            found=f"no solution in {fewest} to {fewest + tries - 1} micro-batches",
            expected="one for some number of micro-batches",
            hint="a longer limit for each program (--flexsp-seconds 60), or leave it out (--flexsp-steps 0)",
        )
    wall = time.perf_counter() - started
    return FlexspResult(best, wall, len(solved), sum(s.timed_out for s in solved), sum(s.warm for s in solved))


def _fewest(ordered: np.ndarray, cost: CostModel) -> int:
    room = cost.world_size * cost.tokens_per_rank
    count = max(1, -(-int(ordered.sum()) // room))
    while any(int(ordered[part].sum()) > room for part in blaster(ordered, count)):
        count += 1
    return count


def blaster(ordered: np.ndarray, count: int) -> list[slice]:
    """`count` runs of descending lengths whose largest token sum is least."""
    total = np.concatenate([[0], np.cumsum(ordered)]).astype(np.float64)
    size = len(ordered)
    least = np.where(np.arange(size + 1) == 0, 0.0, np.inf)
    cuts = np.zeros((count + 1, size + 1), dtype=np.int64)
    for k in range(1, count + 1):
        after = np.full(size + 1, np.inf)
        for stop in range(k, size + 1):
            value = np.maximum(least[:stop], total[stop] - total[:stop])
            cuts[k, stop] = value.argmin()
            after[stop] = value[cuts[k, stop]]
        least = after
    return _runs(cuts, count, size)


def bucket_runs(ordered: np.ndarray, count: int) -> list[slice]:
    """`count` runs of descending lengths that, each taken as its longest, add the fewest tokens."""
    size, count = len(ordered), min(count, len(ordered))
    total = np.concatenate([[0], np.cumsum(ordered)]).astype(np.float64)
    least = np.where(np.arange(size + 1) == 0, 0.0, np.inf)
    cuts = np.zeros((count + 1, size + 1), dtype=np.int64)
    for k in range(1, count + 1):
        after = np.full(size + 1, np.inf)
        for stop in range(k, size + 1):
            start = np.arange(stop)
            value = least[:stop] + ordered[:stop] * (stop - start) - (total[stop] - total[:stop])
            cuts[k, stop] = value.argmin()
            after[stop] = value[cuts[k, stop]]
        least = after
    return _runs(cuts, count, size)


def _runs(cuts: np.ndarray, count: int, size: int) -> list[slice]:
    runs, stop = [], size
    for k in range(count, 0, -1):
        start = int(cuts[k, stop])
        runs.append(slice(start, stop))
        stop = start
    return runs[::-1]


@dataclass(frozen=True, slots=True)
class _Solved:
    groups: list[tuple[int, list[int]]]
    """(degree index, places in the micro-batch)."""
    timed_out: bool
    warm: bool


def solve_micro_batch(ordered: np.ndarray, cost: CostModel, *, time_limit_s: float, buckets: int) -> _Solved | None:
    """Groups of one micro-batch by FlexSP's program; None where it has no solution."""
    if int(ordered.sum()) > cost.world_size * cost.tokens_per_rank:
        return None
    runs = bucket_runs(ordered, buckets)
    tops, counts = ordered[[run.start for run in runs]], np.array([run.stop - run.start for run in runs])
    degrees = np.array([degree.degree for degree in cost.degrees])
    times = np.stack([cost.sequence_s(tops, int(degree)) for degree in degrees], axis=1)
    of = np.repeat(np.arange(len(degrees)), cost.world_size // degrees)
    warm = _warm_start(tops, counts, times, degrees, of, cost)
    limit = float("inf") if warm is None else float((warm * times[:, of]).sum(axis=0).max())
    solution, timed_out = _program(tops, counts, times, degrees, of, cost, limit, time_limit_s)
    chosen = warm if solution is None else solution
    if chosen is None:
        return None
    return _Solved(_unpacked(chosen, runs, of), timed_out, solution is None)


def _program(
    tops: np.ndarray,
    counts: np.ndarray,
    times: np.ndarray,
    degrees: np.ndarray,
    of: np.ndarray,
    cost: CostModel,
    limit: float,
    time_limit_s: float,
) -> tuple[np.ndarray | None, bool]:
    """min C: Time_p <= C, Memory_p <= E, sum d_p m_p <= N, sum_q A_qp <= K m_p, sum_p A_qp = n_q; (A or None, timed out)."""
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import block_array, csr_array, eye_array, kron

    q, p = len(tops), len(of)
    one = np.ones((1, q))
    identity, capacity = eye_array(p), cost.tokens_per_rank * degrees[of]
    a_time = csr_array(np.hstack([np.diag(times[i, of]) for i in range(q)]))
    rows: list[list[Any]] = [
        [a_time, None, csr_array(-np.ones((p, 1)))],
        [kron(csr_array(tops[None, :].astype(float)), identity), csr_array(np.diag(-capacity.astype(float))), None],
        [kron(csr_array(one), identity), csr_array(np.diag(np.full(p, -float(counts.sum())))), None],
        [None, csr_array(degrees[of][None, :].astype(float)), None],
        [kron(eye_array(q), csr_array(np.ones((1, p)))), None, None],
    ]
    matrix = csr_array(block_array(rows))
    high = np.concatenate([np.zeros(3 * p), [cost.world_size], counts])
    low = np.concatenate([np.full(3 * p + 1, -np.inf), counts])
    fits = (tops[:, None] <= capacity[None, :]).ravel()
    upper = np.concatenate([np.where(fits, np.repeat(counts, p), 0), np.ones(p), [limit]])
    result = milp(
        np.concatenate([np.zeros(q * p + p), [1.0]]),
        integrality=np.concatenate([np.ones(q * p + p), [0]]),
        bounds=Bounds(0, upper),
        constraints=LinearConstraint(matrix, low, high),
        options={"time_limit": time_limit_s},
    )
    chosen = None if result.x is None else np.rint(result.x[: q * p]).astype(np.int64).reshape(q, p)
    return chosen, result.status == 1


def _warm_start(
    tops: np.ndarray, counts: np.ndarray, times: np.ndarray, degrees: np.ndarray, of: np.ndarray, cost: CostModel
) -> np.ndarray | None:
    """The best plan of one degree: longest first onto the group with the fewest tokens."""
    best, best_s = None, float("inf")
    for d, degree in enumerate(degrees):
        groups = np.flatnonzero(of == d)
        tokens = np.zeros(len(groups), dtype=np.int64)
        assigned = np.zeros((len(tops), len(of)), dtype=np.int64)
        for bucket, top in enumerate(tops):
            for _ in range(counts[bucket]):
                least = int(tokens.argmin())
                tokens[least] += top
                assigned[bucket, groups[least]] += 1
        seconds = float((assigned * times[:, of]).sum(axis=0).max())
        if tokens.max() <= degree * cost.tokens_per_rank and seconds < best_s:
            best, best_s = assigned, seconds
    return best


def _unpacked(chosen: np.ndarray, runs: list[slice], of: np.ndarray) -> list[tuple[int, list[int]]]:
    """Sequences of every bucket dealt to the groups that take so many of it."""
    groups: dict[int, list[int]] = {}
    for bucket, run in enumerate(runs):
        places = list(range(run.start, run.stop))
        for group in np.flatnonzero(chosen[bucket]):
            groups.setdefault(int(group), []).extend(places.pop() for _ in range(chosen[bucket, group]))
        assert not places
    return [(int(of[group]), places) for group, places in groups.items()]


def _placed(groups: list[tuple[int, list[int]]], order: np.ndarray, cost: CostModel) -> MicroBatch:
    """Largest groups first, so that every block is aligned."""
    placed, rank = [], 0
    for d, places in sorted(groups, key=lambda group: (-group[0], group[1])):
        degree = cost.degrees[d]
        placed.append(Group(rank, degree.degree, degree.ulysses, tuple(sorted(int(order[place]) for place in places))))
        rank += degree.degree
    return MicroBatch(tuple(placed))
