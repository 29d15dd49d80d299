"""Schedules as data: what their hash depends on, what the check refuses, how they read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from efflaunch.errors import PlanError
from efflaunch.parallel.experts.cost import CALIBRATED, ExpertLayer, Operator, Resource, WeightGradients
from efflaunch.parallel.experts.plan import ExpertSchedule, Phase, PhasePlan, Streams, Task, check_phase, check_schedule, describe
from efflaunch.parallel.experts.solve import solve
from efflaunch.parallel.experts.testbeds import TESTBEDS

LAYER = ExpertLayer(batch=2, tokens=512, hidden=1024, ffn=2048, heads=8, capacity=1.2)


@pytest.fixture(scope="module")
def schedule() -> ExpertSchedule:
    return solve(TESTBEDS["B"].cost(LAYER), CALIBRATED, layers=2)


def changed(plan: PhasePlan, number: int, **fields: object) -> PhasePlan:
    tasks = list(plan.tasks)
    tasks[number] = replace(tasks[number], **fields)  # type: ignore[arg-type]
    return replace(plan, tasks=tuple(tasks))


def swapped(plan: PhasePlan, stream: int, first: int, second: int) -> PhasePlan:
    order = list(plan.orders[stream])
    order[first], order[second] = order[second], order[first]
    return replace(plan, orders=(*plan.orders[:stream], tuple(order), *plan.orders[stream + 1 :]))


def reductions(plan: PhasePlan) -> list[int]:
    return [number for number, task in enumerate(plan.tasks) if task.operator is Operator.REDUCE]


def test_what_solve_makes_can_be_executed(schedule: ExpertSchedule) -> None:
    check_schedule(schedule)
    assert schedule.parts == schedule.forward.parts == schedule.backward.parts


def test_the_digest_is_of_what_is_executed(schedule: ExpertSchedule) -> None:
    again = solve(TESTBEDS["B"].cost(LAYER), CALIBRATED, layers=2)
    assert again == schedule and again.digest == schedule.digest and len(schedule.digest) == 64
    assert replace(schedule, predicted_s=1.0, name="another").digest == schedule.digest
    backward = schedule.backward
    piece = reductions(backward)[0]
    others = [
        swapped(backward, 0, 0, 1),
        changed(backward, piece, elements=backward.tasks[piece].elements + 1),
        changed(backward, 5, needs=()),
        replace(backward, degree=backward.degree + 1),
    ]
    digests = {replace(schedule, backward=other).digest for other in others} | {schedule.digest}
    assert len(digests) == 5


def test_the_digest_of_a_known_plan_does_not_change() -> None:
    """Ranks of one job may not all run the same version for ever: a change of the format is to be seen."""
    task = Task(Operator.ATTENTION, Resource.COMPUTE, 0, 0, 0, ())
    plan = PhasePlan(
        phase=Phase.FORWARD,
        layers=1,
        parts=1,
        degree=1,
        weights=WeightGradients.FUSED,
        horizon=1,
        gradient_elements=0,
        streams=Streams.ONE,
        tasks=(task,),
        orders=((0,),),
    )
    known = ExpertSchedule(name="known", forward=plan, backward=replace(plan, phase=Phase.BACKWARD), predicted_s=0.0)
    assert known.digest == "52337cceb089c21f671ad2dd774130714f18c05c8ba66c4499d80a786e97f49a"


Change = Callable[[PhasePlan], PhasePlan]


def _without_a_piece(plan: PhasePlan) -> PhasePlan:
    """The last task is a piece, on the last stream."""
    last = len(plan.tasks) - 1
    orders = tuple(tuple(number for number in order if number != last) for order in plan.orders)
    return replace(plan, tasks=plan.tasks[:-1], orders=orders)


def _first(plan: PhasePlan, operator: Operator) -> int:
    return next(number for number, task in enumerate(plan.tasks) if task.operator is operator)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda plan: replace(plan, orders=(plan.orders[0][1:], *plan.orders[1:])), "tasks in no order, or in two"),
        (lambda plan: replace(plan, orders=(plan.orders[1], plan.orders[0], plan.orders[2])), "on the stream of another resource"),
        (lambda plan: swapped(plan, 0, 0, len(plan.orders[0]) - 1), "wait for each other for ever"),
        (lambda plan: changed(plan, _first(plan, Operator.EXPERTS), needs=()), "EXPERTS of layer 1, part 0, chunk 0 before"),
        (lambda plan: changed(plan, _first(plan, Operator.EXPERTS), chunk=99), "before"),
        (lambda plan: changed(plan, _first(plan, Operator.GATE), operator=Operator.INVERSE_ORDER), "of 4 tasks GATE"),
        (_without_a_piece, "gradients reduced of"),
        (lambda plan: changed(plan, reductions(plan)[1], first_element=0), "reduced twice, or not at all"),
        (lambda plan: changed(plan, reductions(plan)[0], needs=()), "reduced before they are complete"),
    ],
    ids=["missing", "stream", "deadlock", "needs", "chunk", "operator", "lost", "twice", "early"],
)
def test_what_cannot_be_executed_is_refused(schedule: ExpertSchedule, change: Change, words: str) -> None:
    with pytest.raises(PlanError, match=words):
        check_phase(change(schedule.backward))


def test_both_phases_have_the_same_parts(schedule: ExpertSchedule) -> None:
    with pytest.raises(PlanError, match="another number of parts"):
        check_schedule(replace(schedule, forward=replace(schedule.forward, parts=4)))


def test_in_words(schedule: ExpertSchedule) -> None:
    words = describe(schedule)
    assert f"{1e3 * schedule.predicted_s:.2f} ms predicted, {schedule.digest[:12]}" in words
    assert "ours, half-batches: 2 parts of the batch, interleaved" in words
    assert f"forward: experts in {schedule.forward.degree} chunk" in words
    assert f"in {len(schedule.backward.pieces)} pieces of" in words and "deferred, by 1 layer" in words


def test_streams_of_resources() -> None:
    assert [Streams.TWO.of(resource) for resource in Resource] == [0, 1, 1]
    assert [Streams.ONE.of(resource) for resource in Resource] == [0, 0, 0]
