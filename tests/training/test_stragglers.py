"""Stragglers on synthetic series: who is named, and above all who is not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from efflaunch.parallel.sequence.cost import CostModel, DegreeCost
from efflaunch.parallel.sequence.plan import Group, MicroBatch, StepPlan
from efflaunch.training.reporting.step_pace import Pace
from efflaunch.training.reporting.stragglers import ENOUGH, WINDOW, WINDOWS, Straggler, Stragglers, slowness

WORLD = 8
COST = CostModel(
    world_size=WORLD,
    tokens_per_rank=8192,
    degrees=(
        DegreeCost(degree=1, ulysses=1, attention_s=2e-9, linear_s=1e-5),
        DegreeCost(degree=2, ulysses=2, attention_s=1e-9, linear_s=5e-6, exchange_s=1e-6),
        DegreeCost(degree=4, ulysses=2, attention_s=5e-10, linear_s=2.5e-6, exchange_s=5e-7, ring_s=1e-7),
    ),
)
Plans = Callable[[np.random.Generator], StepPlan]


def equal(rng: np.random.Generator) -> StepPlan:
    """Every rank one sequence of its own, all alike."""
    return StepPlan(WORLD, (4096,) * WORLD, (MicroBatch(tuple(Group(rank, 1, 1, (rank,)) for rank in range(WORLD))),))


def unequal(rng: np.random.Generator) -> StepPlan:
    """As adaptive plans are: always a long sequence over ranks 0 to 3, middling ones over 4 and 5, short ones on 6 and 7."""
    lengths = tuple(int(n) for n in (*rng.integers(20_000, 30_000, 2), *rng.integers(4000, 9000, 4), *rng.integers(1500, 6000, 8)))
    first = MicroBatch((Group(0, 4, 2, (0,)), Group(4, 2, 2, (2, 3)), Group(6, 1, 1, (6, 7, 8)), Group(7, 1, 1, (9,))))
    second = MicroBatch((Group(0, 4, 2, (1,)), Group(4, 2, 2, (4, 5)), Group(6, 1, 1, (10,)), Group(7, 1, 1, (11, 12, 13))))
    return StepPlan(WORLD, lengths, (first, second))


def own_s(plan: StepPlan, true: CostModel, rng: np.random.Generator, noise: float, slow: dict[int, float]) -> list[float]:
    """What ranks take where `true` is how the machine really is."""
    seconds = np.zeros(plan.world_size)
    for batch in plan.micro_batches:
        for group in batch.groups:
            spent = true.group_s([plan.lengths[i] for i in group.sequences], group.degree)
            seconds[group.first_rank : group.first_rank + group.degree] += spent
    seconds *= rng.lognormal(0.0, noise, plan.world_size)
    for rank, factor in slow.items():
        seconds[rank] *= factor
    return seconds.tolist()


def without_sending(cost: CostModel) -> CostModel:
    return replace(cost, degrees=tuple(replace(degree, exchange_s=0.0, ring_s=0.0) for degree in cost.degrees))


def off_model() -> CostModel:
    """A machine on which attention takes three times what the model says of it, linear work half, and large groups do badly."""
    factors = {1: (3.0, 0.5), 2: (4.0, 0.8), 4: (6.0, 1.5)}
    return replace(
        without_sending(COST),
        degrees=tuple(
            replace(
                degree,
                attention_s=degree.attention_s * factors[degree.degree][0],
                linear_s=degree.linear_s * factors[degree.degree][1],
                exchange_s=0.0,
                ring_s=0.0,
            )
            for degree in COST.degrees
        ),
    )


def run(plans: Plans, true: CostModel, *, steps: int, noise: float = 0.05, slow: Callable[[int], dict[int, float]], seed: int = 0):
    """Everything that was told, with the step of it."""
    rng, watch, reported = np.random.default_rng(seed), Stragglers(COST), []
    for step in range(steps):
        plan = plans(rng)
        news = watch.add(plan, own_s(plan, true, rng, noise, slow(step)))
        if news is not None:
            reported.append((step, news))
    return reported


def nobody(step: int) -> dict[int, float]:
    return {}


@pytest.mark.parametrize("plans", [equal, unequal])
@pytest.mark.parametrize("true", [without_sending(COST), off_model()], ids=["as modelled", "off the model"])
@pytest.mark.parametrize("seed", range(5))
def test_no_false_alarm(plans: Plans, true: CostModel, seed: int) -> None:
    """Noise of 20 %, work unequal on purpose, a model that is off: nobody is named in 400 steps."""
    assert run(plans, true, steps=400, noise=0.2, slow=nobody, seed=seed) == []


@pytest.mark.parametrize("plans", [equal, unequal])
@pytest.mark.parametrize("true", [without_sending(COST), off_model()], ids=["as modelled", "off the model"])
@pytest.mark.parametrize("rank", [0, 5, 7])
def test_a_slow_rank_is_named(plans: Plans, true: CostModel, rank: int) -> None:
    """Twice as slow. Where a rank is one of few in groups of its size, the fit takes a part of that for the groups' own."""
    reported = run(plans, true, steps=2 + WINDOW * WINDOWS, slow=lambda step: {rank: 2.0})
    assert [[straggler.rank for straggler in news] for _, news in reported] == [[rank]]
    assert reported[0][0] == 1 + WINDOW * ENOUGH, "after as many windows as are enough"
    assert 1.25 < reported[0][1][0].ratio < 2.2


def test_the_ratio_is_right_where_ranks_can_be_compared() -> None:
    ((_, (straggler,)),) = run(equal, without_sending(COST), steps=50, noise=0.01, slow=lambda step: {3: 1.5})
    assert straggler.rank == 3 and straggler.ratio == pytest.approx(1.5, rel=0.02)


def test_a_bad_moment_is_no_straggler() -> None:
    """A few windows, as from a neighbour's backup."""
    assert run(equal, without_sending(COST), steps=400, slow=lambda step: {2: 3.0} if step // WINDOW in (3, 4, 20, 30) else {}) == []


def test_one_that_recovers_is_reported_once_more() -> None:
    reported = run(equal, without_sending(COST), steps=400, slow=lambda step: {2: 2.0} if step < 100 else {})
    assert [[straggler.rank for straggler in news] for _, news in reported] == [[2], []] and reported[1][0] > 100


def test_at_the_border_it_is_not_reported_again_and_again() -> None:
    reported = run(equal, without_sending(COST), steps=2000, noise=0.02, slow=lambda step: {2: 1.25})
    assert len(reported) < 30


def test_two_slow_ranks_of_one_node() -> None:
    reported = run(equal, without_sending(COST), steps=60, slow=lambda step: {6: 1.6, 7: 1.6})
    assert {straggler.rank for straggler in reported[-1][1]} == {6, 7}


def test_of_two_ranks_the_slower_one() -> None:
    cost = replace(COST, world_size=2, degrees=COST.degrees[:2])
    watch, reported = Stragglers(cost), []
    plan = StepPlan(2, (3000, 3000), (MicroBatch((Group(0, 1, 1, (0,)), Group(1, 1, 1, (1,)))),))
    for _ in range(2 + WINDOW * WINDOWS):
        reported.append(watch.add(plan, [0.1, 0.17]))
    assert [news for news in reported if news] == [[Straggler(1, pytest.approx(1.7))]]


def test_a_rank_in_a_ring_whose_neighbour_waits() -> None:
    """Own seconds leave waits out, so of one group only the slow member is named."""
    cost = replace(COST, world_size=2, degrees=COST.degrees[:2])
    plan = StepPlan(2, (9000,), (MicroBatch((Group(0, 2, 2, (0,)),)),))
    watch = Stragglers(cost)
    reported = [watch.add(plan, [0.4, 0.1]) for _ in range(2 + WINDOW * WINDOWS)]
    assert [news for news in reported if news] == [[Straggler(0, pytest.approx(4.0))]]


def test_idle_ranks_and_single_ranks_are_not_judged() -> None:
    plan = StepPlan(4, (4096, 4096, 10), (MicroBatch((Group(0, 1, 1, (0,)), Group(1, 1, 1, (1,)), Group(2, 1, 1, (2,)))),))
    cost = replace(COST, world_size=4)
    watch = Stragglers(cost)
    assert all(watch.add(plan, [0.1, 0.1, 0.5, 0.0]) is None for _ in range(100)), "ten tokens are no evidence"
    alone = Stragglers(replace(COST, world_size=1, degrees=COST.degrees[:1]))
    single = StepPlan(1, (100,), (MicroBatch((Group(0, 1, 1, (0,)),)),))
    assert all(alone.add(single, [0.1]) is None for _ in range(100))
    assert slowness(np.zeros((3, 2, 1, 2)), np.ones((3, 2))) == {}


def test_the_pace_is_the_plan_or_the_median() -> None:
    pace = Pace()
    assert pace.expected_s() == 0.0 and pace.expected_s(2.5) == 2.5
    for step_s in (9.0, 3.0, 3.0, 4.0):
        pace.add(step_s)
    assert pace.expected_s() == 3.5 == pace.expected_s(1.0) and pace.expected_s(8.0) == 8.0
