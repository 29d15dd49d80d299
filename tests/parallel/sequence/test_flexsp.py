"""FlexSP's planner as we made it again: its parts against brute force, and plans that can be run."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest

from efflaunch.bench.flexsp import flexsp_a100_7b
from efflaunch.errors import PlanError
from efflaunch.parallel.sequence.flexsp import blaster, bucket_runs, flexsp_plan
from efflaunch.parallel.sequence.plan import check_plan
from efflaunch.tests.limits import ENDS_S
from efflaunch.tests.parallel.sequence.tiny import cost_of, optimum

ORDERED = np.array([90, 70, 65, 40, 12, 11, 10, 3])


def all_cuts(size: int, count: int) -> list[list[slice]]:
    plan = []
    for inner in combinations(range(1, size), count - 1):
        edges = [0, *inner, size]
        plan.append([slice(a, b) for a, b in zip(edges, edges[1:], strict=False)])
    return plan


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_blaster_cuts_have_the_least_largest_sum(count: int) -> None:
    def largest(runs: list[slice]) -> int:
        return max(int(ORDERED[run].sum()) for run in runs)

    assert largest(blaster(ORDERED, count)) == min(largest(runs) for runs in all_cuts(len(ORDERED), count))


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_buckets_add_the_fewest_tokens(count: int) -> None:
    def added(runs: list[slice]) -> int:
        return sum(int((ORDERED[run].max() - ORDERED[run]).sum()) for run in runs)

    assert added(bucket_runs(ORDERED, count)) == min(added(runs) for runs in all_cuts(len(ORDERED), count))


def test_a_micro_batch_is_solved_exactly() -> None:
    cost = cost_of(4, beta_s=5.0)
    lengths = [900, 700, 300, 200]
    plan = flexsp_plan(lengths, cost, time_limit_s=ENDS_S, tries=1)
    check_plan(plan.plan)
    assert plan.timeouts == 0
    # One bucket a sequence, and so large a beta that one micro-batch is best: nothing is lost to its restrictions.
    assert cost.plan_s(plan.plan) == pytest.approx(optimum(lengths, cost), rel=1e-4)


def test_long_tailed_batches_are_planned_within_memory() -> None:
    cost = cost_of(8)
    drawn = np.random.default_rng(0).lognormal(np.log(300), 1.2, 40)
    lengths = np.clip(drawn, 1, cost.max_seq_len).astype(int).tolist()
    plan = flexsp_plan(lengths, cost, time_limit_s=0.5).plan
    check_plan(plan)
    for batch in plan.micro_batches:
        for group in batch.groups:
            assert sum(lengths[i] for i in group.sequences) <= group.degree * cost.tokens_per_rank
    assert plan.source == "FlexSP"
    assert plan.predicted_s == pytest.approx(cost.plan_s(plan))


def test_too_long_a_sequence_is_named() -> None:
    with pytest.raises(PlanError, match="sequence 0 with 9999 tokens"):
        flexsp_plan([9999], cost_of(4))


def test_published_constants() -> None:
    cost = flexsp_a100_7b(64)
    assert cost.tokens_per_rank == 6407
    assert cost.of(64).exchange_s == pytest.approx(6.4e-6, rel=0.01)
    assert cost.of(8).exchange_s == pytest.approx(2.6e-6, rel=0.01)
    assert cost.of(64).linear_s == pytest.approx(2.9e-6, rel=0.01)
    assert cost.is_monotone()
    assert flexsp_a100_7b(256).largest == 64
