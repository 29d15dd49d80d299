"""Forward passes without a backward, through all stages: for scores, and for the routing of a whole step."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..model.stage import Objective, Stage, stage_of
from ..parallel.pipeline.links import StageLinks
from ..parallel.pipeline.pipeline_plan import ActionKind, Unit, UnitKind
from ..parallel.sequence.clock import BusyClock
from .micro_batches import MicroBatchWork, to_tokens
from .step_setup import StepSetup

ObjectiveOf = Callable[[MicroBatchWork], Objective]


@torch.no_grad()
def forward_only(
    setup: StepSetup, micro_batches: Sequence[MicroBatchWork], objective: ObjectiveOf
) -> list[tuple[MicroBatchWork, Tensor]]:
    """Each micro-batch with what `objective` makes of its last layer output; none on ranks without the last stage. Collective."""
    stage = stage_of(setup.model)
    if stage.links is not None:
        return _through_stages(setup, stage, stage.links, micro_batches, objective)
    return [(work, _forward(setup, stage, work, objective)) for work in micro_batches]


def _forward(
    setup: StepSetup, stage: Stage, work: MicroBatchWork, objective: ObjectiveOf, received: Tensor | None = None, part: int = 0
) -> Tensor:
    attention, last = setup.attention(work, BusyClock(setup.device)), stage.parts[part].last
    return stage.weights.forward(to_tokens(work, setup.device), attention, objective(work) if last else None, received, part)


def _through_stages(
    setup: StepSetup, stage: Stage, links: StageLinks, micro_batches: Sequence[MicroBatchWork], objective: ObjectiveOf
) -> list[tuple[MicroBatchWork, Tensor]]:
    """The forward units of a step's actions, with their messages: in the same order, so they cannot hang either."""
    place, outputs = links.place, dict[Unit, Tensor]()
    for action in setup.actions(place, len(micro_batches)):
        unit = action.unit
        if unit.kind is not UnitKind.FORWARD:
            continue
        work = micro_batches[unit.micro_batch]
        if action.kind is ActionKind.RECEIVE and action.peer is not None:
            links.post(unit, action.peer, work.shard.num_tokens)
        elif action.kind is ActionKind.SEND and action.peer is not None:
            links.send(unit, action.peer, outputs.pop(unit))
            links.release_oldest()
        else:
            part = place.part_of(unit.stage)
            sender = Unit(unit.kind, unit.stage - 1, unit.micro_batch)
            before = None if stage.parts[part].first else links.take(sender, work.shard.num_tokens)
            outputs[unit] = _forward(setup, stage, work, objective, before, part)
    links.finish()
    if not place.has_head:
        return []
    last = place.num_stages - 1
    return [(work, outputs[Unit(UnitKind.FORWARD, last, number)]) for number, work in enumerate(micro_batches)]
