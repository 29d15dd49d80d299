"""What ranks of small pipelines do in tests: build their stage, and make steps of a few documents."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from efflaunch.model.build import build_model
from efflaunch.parallel.sequence.attention import CpuKernel
from efflaunch.parallel.topology import build_topology
from efflaunch.tests.parity.ranks_side import POLICIES, ListSource, stage_place
from efflaunch.tests.parity.reference import hf_config
from efflaunch.tests.parity.test_parity import batch, make_documents, plan_of
from efflaunch.training.micro_batches import MicroBatchWork, count_targets, read_step
from efflaunch.training.objectives.heads import LanguageModelling
from efflaunch.training.step import abandon_step, backward_step
from efflaunch.training.step_setup import StepSetup

CPU = torch.device("cpu")
LENGTHS = (37, 5, 64, 18)
PLAN = plan_of(1, *(batch((0, 1, 1, (index,))) for index in range(len(LENGTHS))), lengths=LENGTHS)


def prepared(stages: int) -> tuple[StepSetup, list[MicroBatchWork]]:
    """The settings of a rank of one place in a stage, and its work in four micro-batches."""
    torch.set_num_threads(1)
    topology, config = build_topology(replicate=1, device="cpu", stages=stages), hf_config("llama_deep")
    place = stage_place(topology, config.num_hidden_layers)
    options: dict[str, Any] = {"device": CPU, "compute_dtype": torch.float32, "seed": 0, "loss_chunk_tokens": 16, "place": place}
    model = build_model(config, POLICIES["recompute"], topology.mesh, **options)
    setup = StepSetup(model=model, topology=topology, kernel=CpuKernel(), device=CPU, reduce_each=False)
    return setup, read_step(ListSource(*make_documents(LENGTHS)), 0, PLAN, 0)  # type: ignore[arg-type]


class Dying(LanguageModelling):
    """An objective whose rank dies at its second micro-batch."""

    asked = 0

    def head_loss(self, shard: Any, *, leads: bool, group_sum: Any) -> Any:
        self.asked += 1
        if self.asked == 2:
            os._exit(3)
        return super().head_loss(shard, leads=leads, group_sum=group_sum)


def with_a_lost_partner(rank: int, ranks: int, store: Path, said: Path, results: Any) -> None:
    """Rank 1 dies in mid-schedule; rank 0 writes what its error says."""
    dist.init_process_group("gloo", store=dist.FileStore(str(store), ranks), rank=rank, world_size=ranks)
    setup, works = prepared(ranks)
    count = count_targets(works, setup.topology, CPU)
    try:
        backward_step(setup, works, (Dying if rank else LanguageModelling)(count, CPU))
    except RuntimeError as error:
        abandon_step(setup.model)
        said.write_text(str(error))
    results.put({})
