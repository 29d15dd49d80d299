"""Schedules: what one rank does in a step, as an explicit list of actions. Pure.

Note: what is reduced when. Gradients of a backward pass add to those of the passes before it. A reduction takes all that piled up
since the last one over the ranks that hold parts of the same weights; every such rank makes the same reductions in the same order.
It rides on a backward pass, which must then be one that all of them make.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from enum import Enum

from ...errors import PlanError


class Kind(Enum):
    """What an action does; values are the letters schedules are printed with."""

    FORWARD = "F"
    """Run the stage on a micro-batch; what its backward needs waits."""
    BACKWARD = "B"
    """Add a micro-batch's gradients to the pile; nothing of it waits any more."""
    REDUCE = "R"
    """Reduce the pile, with the backward of the same micro-batch, which comes right before it."""
    GATHER = "G"
    """Gather all weights; they stay whole until `REDUCE_EMPTY`."""
    REDUCE_EMPTY = "E"
    """Reduce the pile with a pass of its own, without tokens, for ranks whose last micro-batches differ."""


@dataclass(frozen=True, slots=True)
class Action:
    """One action, of one micro-batch (None: of the step)."""

    kind: Kind
    micro_batch: int | None = None

    def __str__(self) -> str:
        return self.kind.value if self.micro_batch is None else f"{self.kind.value}{self.micro_batch}"


Schedule = tuple[Action, ...]


def describe(schedule: Schedule) -> str:
    """The schedule on one line: `F0 B0 F1 B1 R1`."""
    return " ".join(map(str, schedule))


def parse(text: str) -> Schedule:
    """The inverse of `describe`; PlanError for a word that is no action."""
    return tuple(_action(word) for word in text.split())


def _action(word: str) -> Action:
    letters = {kind.value: kind for kind in Kind}
    kind, number = letters.get(word[:1]), word[1:]
    if kind is None or (number.isdecimal() != _has_micro_batch(kind)) or (number and not number.isdecimal()):
        expected = "F, B or R with the number of a micro-batch, G or E"
        raise PlanError("schedule", found=repr(word), expected=expected, hint="such as F0 B0 F1 B1 R1")
    return Action(kind, int(number) if number else None)


def _has_micro_batch(kind: Kind) -> bool:
    return kind in (Kind.FORWARD, Kind.BACKWARD, Kind.REDUCE)


def single_stage(num_micro_batches: int, *, reduce_each: bool) -> Schedule:
    """One micro-batch after the other, all of the model; gradients are reduced after each, or once with the last."""
    order = [(kind, index) for index in range(num_micro_batches) for kind in (Kind.FORWARD, Kind.BACKWARD)]
    return _reduced(order, reduce_each=reduce_each)


def barrier_free(own: Iterable[int]) -> Schedule:
    """The micro-batches of `own` alone, without waiting for ranks of other groups within the step.

    Note: reductions cannot ride on a rank's last micro-batch: its partners may have more to do first, and need it. They ride on
    one more pass, of no tokens, that all ranks make at the end.
    """
    passes = [Action(kind, index) for index in own for kind in (Kind.FORWARD, Kind.BACKWARD)]
    return (Action(Kind.GATHER), *passes, Action(Kind.REDUCE_EMPTY))


def _reduced(order: Sequence[tuple[Kind, int]], *, reduce_each: bool) -> Schedule:
    """The passes with the reductions that ride on backward ones: on each, or on the last."""
    actions: list[Action] = []
    for place, (kind, index) in enumerate(order):
        actions.append(Action(kind, index))
        if kind is Kind.BACKWARD and (reduce_each or place == len(order) - 1):
            actions.append(Action(Kind.REDUCE, index))
    return tuple(actions)


def max_in_flight(schedule: Schedule) -> int:
    """Micro-batches that went forward and wait for their backward, at most at one time: what host stores must have room for."""
    waiting = most = 0
    for action in schedule:
        waiting += (action.kind is Kind.FORWARD) - (action.kind is Kind.BACKWARD)
        most = max(most, waiting)
    return most


def check_schedule(schedule: Schedule, micro_batches: Collection[int]) -> None:
    """PlanError unless every one of `micro_batches` goes forward once, then backward once, and every gradient is reduced at the end."""
    waiting: set[int] = set()
    done: set[int] = set()
    whole, piled = False, False
    for index, action in enumerate(schedule):
        number = action.micro_batch
        if action.kind is Kind.FORWARD:
            _require(number in micro_batches and number not in waiting | done, schedule, f"{action} twice, or of no micro-batch")
            waiting.add(_number(action))
        elif action.kind is Kind.BACKWARD:
            _require(number in waiting, schedule, f"{action} without F{number} before it")
            waiting.remove(_number(action))
            done.add(_number(action))
            piled = True
        elif action.kind is Kind.REDUCE:
            before = schedule[index - 1] if index else None
            _require(before == Action(Kind.BACKWARD, number), schedule, f"{action} without B{number} right before it")
            piled = False
        elif action.kind is Kind.GATHER:
            _require(not (whole or waiting), schedule, "G twice, or with micro-batches in flight")
            whole = True
        else:
            _require(not waiting, schedule, "E with micro-batches in flight")
            whole, piled = False, False
    _require(not waiting, schedule, f"no B{min(waiting, default=0)}")
    _require(done == set(micro_batches), schedule, f"not every micro-batch of {sorted(micro_batches)}")
    _require(not (piled or whole), schedule, "gradients that are never reduced, or weights that stay whole")


def _number(action: Action) -> int:
    assert action.micro_batch is not None
    return action.micro_batch


def _require(holds: bool, schedule: Schedule, found: str) -> None:
    if not holds:
        expected = "each micro-batch forward, then backward, and all gradients reduced"
        raise PlanError(f"schedule {describe(schedule)}", found=found, expected=expected, hint="such as F0 B0 F1 B1 R1")
