"""Explanations: the longest sequence's choices, the next-best plan against brute force, and the words."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import pytest

from efflaunch.errors import PlanError
from efflaunch.parallel.sequence.cost import CostModel, DegreeCost
from efflaunch.parallel.sequence.explain import Verdict, bar, degree_choices, explain
from efflaunch.parallel.sequence.plan import Group, MicroBatch, StepPlan, check_plan

LENGTHS = (9000, 4000, 3000, 100)


def model(exchange_s: float = 2e-6) -> CostModel:
    """Four ranks of 4,096 tokens; more ranks cost exchanges."""
    degrees = tuple(
        DegreeCost(degree=d, ulysses=min(d, 2), attention_s=1e-8 / d, linear_s=2e-5 / d, exchange_s=0.0 if d == 1 else exchange_s)
        for d in (1, 2, 4)
    )
    return CostModel(world_size=4, tokens_per_rank=5000, degrees=degrees, excluded=((8, "8 ranks are not there"),), beta_s=0.05)


def every_plan(lengths: tuple[int, ...], cost: CostModel) -> list[StepPlan]:
    """All ways to put four sequences into at most two micro-batches of aligned groups over four ranks."""
    tilings = ([(0, 4)], [(0, 2), (2, 2)], [(0, 2), (2, 1), (3, 1)], [(0, 1), (1, 1), (2, 2)], [(rank, 1) for rank in range(4)])
    explanation = []
    for first, second in product(tilings, tilings):
        slots = [(0, *slot) for slot in first] + [(1, *slot) for slot in second]
        for places in product(range(len(slots)), repeat=len(lengths)):
            held = [[i for i, place in enumerate(places) if place == slot] for slot in range(len(slots))]
            fits = all(sum(lengths[i] for i in part) <= slots[slot][2] * cost.tokens_per_rank for slot, part in enumerate(held))
            if not fits:
                continue
            groups = [
                [Group(at, d, min(d, 2), tuple(held[s])) for s, (b, at, d) in enumerate(slots) if b == batch and held[s]]
                for batch in (0, 1)
            ]
            explanation.append(StepPlan(4, lengths, tuple(MicroBatch(tuple(batch)) for batch in groups if batch)))
    return explanation


def brute_force(cost: CostModel) -> StepPlan:
    return cost.priced(min(every_plan(LENGTHS, cost), key=cost.plan_s))


def degree_of_longest(plan: StepPlan) -> int:
    return next(group.degree for batch in plan.micro_batches for group in batch.groups if 0 in group.sequences)


def test_the_next_best_plan_is_the_best_of_those_that_keep_the_longest_off_its_degree() -> None:
    cost = model()
    best = brute_force(cost)
    check_plan(best)
    explanation = explain(best, cost, solver=brute_force, others={})
    chosen = degree_of_longest(best)
    other = min((plan for plan in every_plan(LENGTHS, cost) if degree_of_longest(plan) != chosen), key=cost.plan_s)
    assert explanation.next_best is not None
    assert explanation.next_best.predicted_s == pytest.approx(cost.plan_s(other), rel=1e-12)
    assert explanation.next_best.longest_degree == degree_of_longest(other) != chosen
    assert explanation.next_best.predicted_s >= explanation.line.step_s


def test_choices_of_the_longest_sequence() -> None:
    choices = degree_choices(9000, 4, model())
    assert [(choice.degree, choice.verdict) for choice in choices] == [
        (1, Verdict.TOO_SMALL),
        (2, Verdict.POSSIBLE),
        (4, Verdict.CHOSEN),
        (8, Verdict.EXCLUDED),
    ]
    assert choices[0].reason == "1 x 5,000 = 5,000 tokens cannot hold it" and choices[3].reason == "8 ranks are not there"
    assert choices[1].sequence_s == pytest.approx((1e-8 * 9000**2 + 2e-5 * 9000) / 2 + 2e-6 * 9000)
    assert choices[1].rank_s == pytest.approx(2 * choices[1].sequence_s) and choices[2].reason == "2 Ulysses x 2 ring"


def test_a_barred_degree_costs_only_long_sequences_more() -> None:
    cost = model()
    barred = bar(cost, 2, 4000, 7.0)
    plain, more = cost.sequence_s([3999, 4000, 9000], 2), barred.sequence_s([3999, 4000, 9000], 2)
    assert (more - plain).tolist() == pytest.approx([0.0, 7.0, 7.0])
    assert barred.sequence_s([9000], 4).tolist() == cost.sequence_s([9000], 4).tolist()
    assert replace(barred, degrees=cost.degrees) == cost


def test_other_plans_and_those_that_cannot_be() -> None:
    cost = model()
    best = brute_force(cost)

    def impossible(_: CostModel) -> StepPlan:
        raise PlanError("x", found="a sequence that fits nowhere", expected="y", hint="z")

    worst = max(every_plan(LENGTHS, cost), key=cost.plan_s)
    explanation = explain(best, cost, solver=brute_force, others={"worst": lambda _: worst, "never": impossible})
    assert [(other.name, other.predicted_s, other.reason) for other in explanation.alternatives] == [
        ("worst", pytest.approx(cost.plan_s(worst)), ""),
        ("never", None, "a sequence that fits nowhere"),
    ]


def test_the_words_say_why() -> None:
    cost = model()
    best = replace(brute_force(cost), bound="staircase")
    best = replace(best, lower_bound_s=0.8 * cost.plan_s(best))
    words = " ".join(explain(best, cost, solver=brute_force, others={}).words)
    for part in (
        "(staircase bound): this one is at most 25.0% above the best there can be.",
        "The longest sequence, 9,000 tokens (number 0), runs on ranks 0-",
        "Fewer ranks are no choice: 1 x 5,000 = 5,000 tokens cannot hold it.",
        "8 ranks are out: 8 ranks are not there.",
        "Next best: kept off",
        "Ranks work in groups",
    ):
        assert part in words, words


@pytest.mark.parametrize(
    ("barrier_free", "reason"), [(False, "gives some sequences no time"), (True, "are for micro-batches that end together")]
)
def test_a_bound_that_does_not_hold_is_not_claimed(barrier_free: bool, reason: str) -> None:
    cost = model()
    best = brute_force(cost)
    best = replace(best, lower_bound_s=0.8 * cost.plan_s(best) if barrier_free else None, bound="staircase" if barrier_free else "")
    explanation = explain(best, cost, solver=brute_force, others={}, barrier_free=barrier_free)
    assert explanation.words[0].startswith("No lower bound: ") and reason in explanation.words[0] and explanation.plan.lower_bound_s is None
    assert not any("above the best" in text for text in explanation.words)
    assert explanation.line.step_s == pytest.approx(cost.plan_s(best, barrier_free=barrier_free))


@pytest.mark.parametrize(
    ("adaptive", "words"), [(True, "the search missed it"), (False, "this plan has one degree for all, that one has not")]
)
def test_a_plan_that_is_not_the_best_is_said_to_be(adaptive: bool, words: str) -> None:
    cost = model()
    bad = max((plan for plan in every_plan(LENGTHS, cost) if degree_of_longest(plan) == 4), key=cost.plan_s)
    explanation = explain(bad, cost, solver=brute_force, others={}, adaptive=adaptive)
    assert any(text.startswith("Next best") and f"% less: {words}." in text for text in explanation.words), explanation.words


def test_one_degree_leaves_nothing_to_choose() -> None:
    cost = replace(model(), degrees=model().degrees[-1:], excluded=())
    plan = cost.priced(StepPlan(4, (100,), (MicroBatch((Group(0, 4, 2, (0,)),)),)))
    explanation = explain(plan, cost, solver=brute_force, others={})
    assert explanation.next_best is None and [choice.verdict for choice in explanation.choices] == [Verdict.CHOSEN]
