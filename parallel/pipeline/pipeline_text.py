"""Pipeline schedules as text and as JSON, and back. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ...errors import PlanError
from .pipeline_plan import PipelineSchedule, Unit, UnitKind


def describe(schedule: PipelineSchedule) -> str:
    """The schedule as text: a line of sizes, then one of units for each rank."""
    owners = ",".join(map(str, schedule.stage_ranks))
    lines = [f"ranks {schedule.num_ranks} stages {owners} micro-batches {schedule.num_micro_batches} slices {schedule.slices}"]
    return "\n".join([*lines, *(" ".join(map(str, order)) for order in schedule.orders)])


def parse(text: str) -> PipelineSchedule:
    """The inverse of `describe`; PlanError for anything else. What is parsed is not checked yet."""
    first, *lines = text.splitlines() or [""]
    words = first.split()
    numbers = all(words[place].isdecimal() for place in (1, 5, 7)) if len(words) == 8 else False
    if words[::2] != ["ranks", "stages", "micro-batches", "slices"] or not (numbers and _numbers(words[3])):
        raise PlanError("pipeline schedule", found=repr(first), expected=_FIRST, hint="the text that `describe` prints")
    ranks, batches, slices = (int(words[place]) for place in (1, 5, 7))
    owners = tuple(map(int, words[3].split(",")))
    orders = tuple(tuple(_unit(word) for word in line.split()) for line in lines)
    sizes = {"num_stages": len(owners), "num_ranks": ranks, "num_micro_batches": batches, "slices": slices}
    return PipelineSchedule(**sizes, stage_ranks=owners, orders=orders + ((),) * (ranks - len(orders)))


_FIRST = "a first line such as `ranks 2 stages 0,1 micro-batches 4 slices 1`"


def _numbers(word: str) -> bool:
    return all(part.isdecimal() for part in word.split(","))


def _unit(word: str) -> Unit:
    for kind in UnitKind:
        stage, letter, rest = word.partition(kind.value)
        batch, dot, piece = rest.partition(".")
        if letter and stage.isdecimal() and batch.isdecimal() and (piece.isdecimal() if dot else True):
            return Unit(kind, int(stage), int(batch), int(piece or 0))
    raise PlanError("pipeline schedule", found=repr(word), expected="a stage, F, B or W, a micro-batch", hint="such as 0F3, or 0F3.1")


def to_json(schedule: PipelineSchedule) -> dict[str, Any]:
    """The schedule as plain JSON values."""
    return {
        "num_ranks": schedule.num_ranks,
        "stage_ranks": list(schedule.stage_ranks),
        "num_micro_batches": schedule.num_micro_batches,
        "slices": schedule.slices,
        "orders": [" ".join(map(str, order)) for order in schedule.orders],
    }


def from_json(values: Mapping[str, Any]) -> PipelineSchedule:
    """The inverse of `to_json`; PlanError for what it did not write."""
    try:
        owners: Sequence[int] = values["stage_ranks"]
        head = (
            f"ranks {values['num_ranks']} stages {','.join(map(str, owners))} "
            f"micro-batches {values['num_micro_batches']} slices {values['slices']}"
        )
        return parse("\n".join([head, *values["orders"]]))
    except (KeyError, TypeError) as error:
        raise PlanError(
            "pipeline schedule", found=f"no or other {error}", expected="what to_json writes", hint="the file as it was written"
        ) from error
