"""A schedule of a step's layers as data: tasks, what each needs, and a fixed order on every stream. Pure.

Ranks of one job execute the same schedule: with the same order everywhere, no two collectives can wait for each other. `digest` is what
ranks compare before they begin.

Note: gradients are numbered through all layers in the order in which backward completes them, `first_element` on; a piece may hold the
end of one layer's and the start of the next one's.
"""

from __future__ import annotations

import graphlib
import hashlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum

from ...errors import PlanError
from .cost import Operator, Resource, WeightGradients


class Phase(Enum):
    """A direction of the pass."""

    FORWARD = "forward"
    BACKWARD = "backward"


class Streams(Enum):
    """Which tasks wait for each other whatever they need."""

    ONE = ("everything",)
    TWO = ("compute", "communication")
    THREE = ("compute", "intra-node links", "inter-node links")

    def of(self, resource: Resource) -> int:
        """The stream whose tasks occupy a resource."""
        return min(int(resource), len(self.value) - 1)


@dataclass(frozen=True, slots=True)
class Task:
    """One operator on one resource, for a chunk of a part of one layer's rows; or the reduction of a piece of gradients."""

    operator: Operator
    resource: Resource
    layer: int
    part: int
    chunk: int
    needs: tuple[int, ...]
    """Numbers of tasks that end before it starts."""
    first_element: int = 0
    elements: int = 0
    """Of gradients; 0 for what is no reduction."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PhasePlan:
    """One direction of the pass through all layers."""

    phase: Phase
    layers: int
    parts: int
    degree: int
    """Chunks of the experts' rows of each part."""
    weights: WeightGradients
    horizon: int
    """Deferred weight gradients of a layer are done before the one so many layers on begins."""
    gradient_elements: int
    """Of one layer's dense weights, reduced in this phase."""
    streams: Streams
    tasks: tuple[Task, ...]
    orders: tuple[tuple[int, ...], ...]
    """Numbers of tasks as each stream runs them."""

    def share(self, task: Task) -> float:
        """Share of a layer's rows that a task works on."""
        return 1.0 / (self.parts * (self.degree if task.operator in CHUNKED else 1))

    @property
    def pieces(self) -> tuple[Task, ...]:
        """The reductions, in the order in which their stream runs them."""
        return tuple(self.tasks[number] for order in self.orders for number in order if self.tasks[number].elements)


CHUNKED = frozenset(
    {Operator.DISPATCH, Operator.EXPERT_GATHER, Operator.EXPERTS, Operator.EXPERT_SCATTER, Operator.COMBINE, Operator.EXPERT_WEIGHTS}
)
"""Operators on chunks of the experts' rows; the others are on whole parts."""
CHAIN = (Operator.DISPATCH, Operator.EXPERT_GATHER, Operator.EXPERTS, Operator.EXPERT_SCATTER, Operator.COMBINE)
"""Of these a chunk passes through all that its layout has, in this order."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ExpertSchedule:
    """Forward and backward pass, and what they are predicted to take."""

    name: str
    """Of the scheduler it came from."""
    forward: PhasePlan
    backward: PhasePlan
    predicted_s: float

    @property
    def parts(self) -> int:
        """Parts of the micro-batch that are interleaved; 1: it is whole."""
        return self.forward.parts

    @property
    def digest(self) -> str:
        """Equal where two schedules execute alike; predicted times do not count."""
        return hashlib.sha256("\n".join([*_lines(self.forward), *_lines(self.backward)]).encode()).hexdigest()


def _lines(plan: PhasePlan) -> Iterator[str]:
    streams, weights = plan.streams.name, plan.weights.name
    yield f"{plan.phase.name} {plan.layers} {plan.parts} {plan.degree} {weights} {plan.horizon} {plan.gradient_elements} {streams}"
    for task in plan.tasks:
        where = f"{task.operator.name} {task.resource.name} {task.layer} {task.part} {task.chunk}"
        yield f"{where} {task.first_element} {task.elements} {' '.join(map(str, task.needs))}"
    for order in plan.orders:
        yield " ".join(map(str, order))


def describe(schedule: ExpertSchedule) -> str:
    """The schedule in a few lines of words."""
    cut = f"{schedule.parts} parts of the batch, interleaved" if schedule.parts > 1 else "the whole batch"
    lines = [f"{schedule.name}: {cut}, {1e3 * schedule.predicted_s:.2f} ms predicted, {schedule.digest[:12]}"]
    for plan in (schedule.forward, schedule.backward):
        words = [f"  {plan.phase.value}: experts in {plan.degree} chunk{'s' * (plan.degree > 1)}"]
        words.append(f"streams: {', '.join(plan.streams.value)}")
        if plan.weights is not WeightGradients.FUSED:
            words.append(f"weight gradients of {plan.weights.value}, by {plan.horizon} layer{'s' * (plan.horizon > 1)} at most")
        if plan.pieces:
            sizes = [task.elements for task in plan.pieces]
            spread = f"{min(sizes):,}" if len(set(sizes)) == 1 else f"{min(sizes):,} to {max(sizes):,}"
            words.append(f"gradients of {plan.layers} layers in {len(sizes)} pieces of {spread} elements")
        lines.append("; ".join(words))
    return "\n".join(lines)


def check_schedule(schedule: ExpertSchedule) -> None:
    """PlanError unless both phases can be executed, whole and without waiting for ever."""
    _require(schedule.forward.parts == schedule.backward.parts, schedule.forward, "another number of parts in backward")
    for plan in (schedule.forward, schedule.backward):
        check_phase(plan)


def check_phase(plan: PhasePlan) -> None:
    """PlanError for tasks that are missing, twice or before what they need, and for gradients reduced twice, early or not at all."""
    _require(sorted(n for order in plan.orders for n in order) == list(range(len(plan.tasks))), plan, "tasks in no order, or in two")
    for stream, order in enumerate(plan.orders):
        _require(all(plan.streams.of(plan.tasks[n].resource) == stream for n in order), plan, "a task on the stream of another resource")
    _check_chunks(plan)
    before: dict[int, set[int]] = {number: set(task.needs) for number, task in enumerate(plan.tasks)}
    for order in plan.orders:
        for number, following in zip(order, order[1:], strict=False):
            before[following].add(number)
    try:
        graphlib.TopologicalSorter(before).prepare()
    except graphlib.CycleError:
        _require(False, plan, "tasks that wait for each other for ever")
    _check_gradients(plan)


def _check_chunks(plan: PhasePlan) -> None:
    """Every chunk passes through all operators there are, each after the one before it."""
    at: dict[tuple[Operator, int, int, int], set[int]] = {}
    for number, task in enumerate(plan.tasks):
        if task.operator is not Operator.REDUCE:
            at.setdefault((task.operator, task.layer, task.part, task.chunk), set()).add(number)
    counts = Counter(operator for operator, _, _, _ in at)
    for operator, count in counts.items():
        full = plan.layers * plan.parts * (plan.degree if operator in CHUNKED else 1)
        _require(count == full, plan, f"{count} of {full} tasks {operator.name}")
    for operator, layer, part, chunk in at:
        if operator in CHAIN:
            earlier = [kind for kind in CHAIN[: CHAIN.index(operator)] if kind in counts]
            needed = at.get((earlier[-1], layer, part, chunk), {-1}) if earlier else set()
            held = all(needed <= set(plan.tasks[n].needs) for n in at[operator, layer, part, chunk])
            _require(held, plan, f"{operator.name} of layer {layer}, part {part}, chunk {chunk} before {[k.name for k in earlier[-1:]]}")


def _check_gradients(plan: PhasePlan) -> None:
    pieces = sorted((task for task in plan.tasks if task.elements), key=lambda task: task.first_element)
    at = 0
    for piece in pieces:
        _require(piece.first_element == at, plan, f"gradient {min(at, piece.first_element)} reduced twice, or not at all")
        at += piece.elements
    _require(at == plan.layers * plan.gradient_elements, plan, f"{at} gradients reduced of {plan.layers * plan.gradient_elements}")
    deferred = any(task.operator is Operator.ATTENTION_WEIGHTS for task in plan.tasks)
    last = Operator.ATTENTION_WEIGHTS if deferred else Operator.ATTENTION
    completes: dict[int, set[int]] = {}
    for number, task in enumerate(plan.tasks):
        if task.operator is last:
            completes.setdefault(task.layer, set()).add(number)
    for piece in pieces:
        low, high = (e // plan.gradient_elements for e in (piece.first_element, piece.first_element + piece.elements - 1))
        needed = set().union(*(completes[plan.layers - 1 - place] for place in range(low, high + 1)))
        _require(needed <= set(piece.needs), plan, f"gradients {piece.first_element} on reduced before they are complete")


def _require(holds: bool, plan: PhasePlan, found: str) -> None:
    if not holds:
        expected = "every task once, after what it needs, and every gradient reduced once, when it is complete"
        raise PlanError(f"{plan.phase.value} schedule of experts", found=found, expected=expected, hint="a schedule of solve.py")
