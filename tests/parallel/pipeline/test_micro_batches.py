"""Plans of a step for several stages."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest

from efflaunch.parallel.pipeline.micro_batches import plan_for_stages
from efflaunch.parallel.sequence.cost import CostModel, DegreeCost
from efflaunch.parallel.sequence.plan import StepPlan, check_plan
from efflaunch.parallel.sequence.solve import solve_adaptive, solve_greedy

DEGREES = tuple(DegreeCost(degree=d, ulysses=1, attention_s=1e-7 / d, linear_s=1e-3 / d) for d in (1, 2, 4))
ONE = CostModel(world_size=4, tokens_per_rank=4000, degrees=DEGREES, beta_s=0.01)
LENGTHS = (100, 900, 250, 1200, 40, 800, 300, 2000, 700, 50, 60, 1500)


def of(stages: int, least: int | None = None, solve: object = solve_adaptive, lengths: Sequence[int] = LENGTHS) -> StepPlan:
    cost = replace(ONE, num_stages=stages)
    return plan_for_stages(lengths, cost, solve, longest_group=4, least=least)  # type: ignore[arg-type]


def test_one_stage_has_the_solvers_own_plan() -> None:
    assert of(1) == solve_adaptive(LENGTHS, ONE)


@pytest.mark.parametrize("solve", [solve_adaptive, solve_greedy])
@pytest.mark.parametrize("stages", [2, 4, 8])
def test_stages_get_more_micro_batches_and_never_a_slower_step(stages: int, solve: object) -> None:
    plan, cost = of(stages, solve=solve), replace(ONE, num_stages=stages)
    alone = cost.priced(solve(LENGTHS, cost))  # type: ignore[operator]
    check_plan(plan)
    assert sorted(i for batch in plan.micro_batches for group in batch.groups for i in group.sequences) == list(range(len(LENGTHS)))
    assert plan.predicted_s is not None and alone.predicted_s is not None and plan.predicted_s < alone.predicted_s
    assert len(plan.micro_batches) > len(alone.micro_batches)


def test_the_bound_of_one_stages_work_holds() -> None:
    plan = of(4)
    assert plan.lower_bound_s is not None and plan.predicted_s is not None and plan.lower_bound_s < plan.predicted_s


def test_micro_batches_asked_for_are_made_where_sequences_suffice() -> None:
    assert len(of(2, least=6).micro_batches) >= 6 and len(of(2, least=9).micro_batches) >= 9
    assert 1 <= len(of(2, least=50, lengths=(500, 400, 300)).micro_batches) <= 3


def test_the_longest_sequence_keeps_its_room() -> None:
    plan = of(8, lengths=(16000, 10, 10, 10))
    check_plan(plan)
    assert any(0 in group.sequences for batch in plan.micro_batches for group in batch.groups)


def test_a_step_is_longer_by_what_fills_the_stages() -> None:
    cost = replace(ONE, num_stages=3)
    assert cost.pipelined_s([1.0, 4.0, 2.0]) == 7.0 + 2 * 4.0
    assert replace(cost, virtual_stages=2).pipelined_s([1.0, 4.0, 2.0]) == 7.0 + 4.0
    assert cost.pipelined_s([]) == 0.0
