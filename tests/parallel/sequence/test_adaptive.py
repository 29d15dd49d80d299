"""The planner: what its plans hold, that they are never worse than simple ones, the same every time, and what it refuses."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from efflaunch.errors import PlanError
from efflaunch.parallel.sequence.adaptive import adaptive_plan, default_budget
from efflaunch.parallel.sequence.fill import compiled
from efflaunch.parallel.sequence.plan import StepPlan, check_plan
from efflaunch.parallel.sequence.shelves import ShelfSearch
from efflaunch.parallel.sequence.solve import solve_adaptive, solve_best_static, solve_greedy
from efflaunch.parallel.sequence.tables import Batch
from efflaunch.tests.parallel.sequence.tiny import cost_of, optimum, random_cost, random_lengths


def check(plan: StepPlan, cost: object) -> None:
    """Sound, within memory, and predicted as the cost model predicts it from the plan alone."""
    check_plan(plan)
    for batch in plan.micro_batches:
        for group in batch.groups:
            held = [plan.lengths[i] for i in group.sequences]
            assert sum(held) <= group.degree * cost.tokens_per_rank  # type: ignore[attr-defined]
            assert group.predicted_s == pytest.approx(cost.group_s(held, group.degree))  # type: ignore[attr-defined]
    assert plan.predicted_s == pytest.approx(cost.plan_s(plan))  # type: ignore[attr-defined]


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 4000), min_size=1, max_size=40),
    world=st.sampled_from([1, 2, 3, 4, 6, 8, 12, 16]),
    beta=st.sampled_from([0.0, 0.5, 3.0]),
    gather=st.sampled_from([0.0, 1.0]),
)
def test_plans_are_sound_and_never_worse_than_simple_ones(lengths: list[int], world: int, beta: float, gather: float) -> None:
    cost = cost_of(world, beta_s=beta, gather_s=gather, step_s=0.1)
    lengths = [min(length, cost.max_seq_len) for length in lengths]
    plan = solve_adaptive(lengths, cost, budget=4000)
    others = (solve_greedy(lengths, cost), solve_best_static(lengths, cost))
    for made in (plan, *others):
        check(made, cost)
        assert plan.predicted_s <= made.predicted_s * (1 + 1e-12)
    assert plan.lower_bound_s <= plan.predicted_s
    assert plan.gap is not None and plan.gap >= 0


def test_tiny_batches_are_planned_close_to_the_optimum() -> None:
    generator = np.random.default_rng(11)
    for _ in range(60):
        cost = random_cost(generator, monotone=True)
        lengths = random_lengths(generator, cost)
        assert solve_adaptive(lengths, cost).predicted_s <= optimum(lengths, cost) * 1.25


def long_tailed(count: int, seed: int, most: int) -> list[int]:
    drawn = np.random.default_rng(seed).lognormal(np.log(300), 1.3, count)
    return np.clip(drawn, 1, most).astype(np.int64).tolist()


def test_the_same_batch_and_budget_give_the_same_plan() -> None:
    cost = cost_of(16)
    lengths = long_tailed(300, 0, cost.max_seq_len)
    plans = [solve_adaptive(lengths, cost, budget=30_000) for _ in range(2)]
    assert plans[0] == plans[1]
    assert plans[0].predicted_s == plans[1].predicted_s


@pytest.mark.skipif(compiled() is None, reason="numba is not installed")
@pytest.mark.parametrize("seed", range(3))
def test_compiled_and_plain_loops_make_the_same_plan(seed: int) -> None:
    cost = cost_of(16)
    lengths = long_tailed(150, seed, cost.max_seq_len)
    plans = []
    for use_compiled in (True, False):
        batch = Batch(lengths, cost, use_compiled=use_compiled)
        assert batch.is_compiled == use_compiled
        search = ShelfSearch(batch, 20_000, float("inf"))
        shelves = search.run()
        assert shelves is not None
        plans.append((batch.plan(shelves, "adaptive"), search.spent))
    assert plans[0] == plans[1]


def test_more_work_never_makes_a_worse_plan_than_none() -> None:
    cost = cost_of(16)
    lengths = long_tailed(200, 5, cost.max_seq_len)
    seconds = [solve_adaptive(lengths, cost, budget=budget).predicted_s for budget in (0, 100_000)]
    assert seconds[1] <= seconds[0]


def test_the_clock_only_ends_the_search() -> None:
    cost = cost_of(16)
    lengths = long_tailed(200, 6, cost.max_seq_len)
    check(adaptive_plan(lengths, cost, wall_s=0.0), cost)
    assert adaptive_plan(lengths, cost, budget=20_000, wall_s=1e6) == adaptive_plan(lengths, cost, budget=20_000)


@pytest.mark.parametrize(
    ("lengths", "named"),
    [
        ([5, 0, 7], "sequence 1 with 0 tokens"),
        ([-3], "sequence 0 with -3 tokens"),
        ([10, 4001], "sequence 1 with 4001 tokens"),
    ],
)
def test_lengths_that_cannot_be_are_named(lengths: list[int], named: str) -> None:
    cost = cost_of(4)
    for solve in (solve_adaptive, solve_greedy, solve_best_static):
        with pytest.raises(PlanError, match=named) as refused:
            solve(lengths, cost)
        assert "1 to 4000 tokens (4 ranks x parallel.tokens_per_rank=" in str(refused.value)


def test_what_would_hold_a_long_sequence_is_said() -> None:
    with pytest.raises(PlanError, match=r"parallel\.tokens_per_rank=2,?000, more ranks, or a smaller data\.max_seq_len"):
        solve_adaptive([8000], cost_of(4))


def test_no_sequence_is_no_work() -> None:
    plan = solve_adaptive([], cost_of(4, step_s=0.5))
    assert plan.micro_batches == ()
    assert plan.predicted_s == 0.5


def test_equal_lengths_are_shared_evenly() -> None:
    cost = cost_of(8)
    plan = solve_adaptive([500] * 64, cost)
    check(plan, cost)
    assert len(plan.micro_batches) == 4
    assert {group.degree for batch in plan.micro_batches for group in batch.groups} == {1}
    assert plan.gap == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize("world", [1, 3, 12])
def test_worlds_that_are_no_power_of_two_are_filled_by_aligned_blocks(world: int) -> None:
    cost = cost_of(world)
    lengths = long_tailed(80, world, cost.max_seq_len)
    plan = solve_adaptive(lengths, cost)
    check(plan, cost)
    assert max(sum(group.degree for group in batch.groups) for batch in plan.micro_batches) == world


def test_a_hundred_thousand_sequences_are_planned() -> None:
    cost = cost_of(64, tokens_per_rank=6400)
    lengths = long_tailed(100_000, 1, cost.max_seq_len)
    plan = solve_adaptive(lengths, cost)
    check_plan(plan)
    assert plan.gap is not None and plan.gap < 0.1
    assert default_budget(100_000) == default_budget(1_000_000)


def test_memory_is_counted_in_64_bits() -> None:
    cost = cost_of(4, tokens_per_rank=3_000_000_000)
    lengths = [2_500_000_000, 2_400_000_000, 7]
    plan = solve_adaptive(lengths, cost, budget=2000)
    check(plan, cost)
    assert plan.lengths == tuple(lengths)
