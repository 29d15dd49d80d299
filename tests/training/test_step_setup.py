"""What follows from a rank's settings for one step."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from efflaunch.parallel.pipeline.config import PipelineOrder
from efflaunch.parallel.pipeline.pipeline_plan import ActionKind
from efflaunch.parallel.pipeline.place import StagePlace
from efflaunch.parallel.pipeline.plan import describe
from efflaunch.parallel.topology import PipelineRanks
from efflaunch.tests.parity.ranks_side import ListSource
from efflaunch.tests.parity.test_parity import batch, make_documents, plan_of
from efflaunch.training.micro_batches import read_step
from efflaunch.training.step_setup import StepSetup

NONE: Any = None
SETUP = StepSetup(model=NONE, topology=NONE, kernel=NONE, device=torch.device("cpu"), reduce_each=False)
LENGTHS = (37, 5, 64)
PLAN = plan_of(2, batch((0, 2, 1, (2,))), batch((1, 1, 1, (0, 1))), lengths=LENGTHS)
WORKS = read_step(ListSource(*make_documents(LENGTHS)), 0, PLAN, 0)  # type: ignore[arg-type]


def test_one_stage_goes_through_its_micro_batches_in_turn() -> None:
    assert describe(SETUP.schedule(WORKS)) == "F0 B0 F1 B1 R1"
    assert describe(replace(SETUP, reduce_each=True).schedule(WORKS)) == "F0 B0 R0 F1 B1 R1"
    assert describe(replace(SETUP, barrier_free=True).schedule(WORKS)) == "G F0 B0 E", "the rank has no group in the second"


def test_a_pipeline_rank_has_its_part_of_the_configured_order() -> None:
    ranks = PipelineRanks((0, 1), NONE, NONE, NONE, NONE)
    place = StagePlace((range(2),), 1, ranks)
    actions = SETUP.actions(place, 2)
    assert [str(action.unit) for action in actions if action.kind is ActionKind.COMPUTE] == ["1F0", "1B0", "1F1", "1B1"]
    gpipe = replace(SETUP, order=PipelineOrder.GPIPE, gpipe_in_flight=2).actions(place, 2)
    assert [str(action.unit) for action in gpipe if action.kind is ActionKind.COMPUTE] == ["1F0", "1F1", "1B1", "1B0"]
    interleaved = replace(SETUP, order=PipelineOrder.INTERLEAVED).actions(StagePlace((range(1), range(2, 3)), 0, ranks), 1)
    assert [str(action.unit) for action in interleaved if action.kind is ActionKind.COMPUTE] == ["0F0", "2F0", "2B0", "0B0"]
    assert SETUP.actions(place, 0) == ()
