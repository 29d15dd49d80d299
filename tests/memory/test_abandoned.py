"""An exception in the middle of a pass leaves nothing gathered and nothing stored, and the next step is as if there had been none."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from efflaunch.memory.config import AttentionTiling
from efflaunch.memory.executor.layer_pass import LayerRun
from efflaunch.memory.policy import MOVED, MemoryPolicy
from efflaunch.model.build import build_model
from efflaunch.parallel.sequence.attention import CpuKernel
from efflaunch.parallel.sharding.fsdp2 import groups_of, shard_model
from efflaunch.parallel.topology import build_topology
from efflaunch.tests.parity.ranks_side import ListSource, StrictStore
from efflaunch.tests.parity.reference import hf_config
from efflaunch.tests.parity.test_parity import LENGTHS, batch, make_documents, plan_of
from efflaunch.tests.ranks import RankPool
from efflaunch.training.micro_batches import count_targets, read_step
from efflaunch.training.objectives.heads import LanguageModelling
from efflaunch.training.step import abandon_step, backward_step
from efflaunch.training.step_setup import StepSetup

POLICY = MemoryPolicy(
    layer_input=MOVED, attention_output=MOVED, mlp=MOVED, segment_layers=3, chunk_tokens=9, attention=AttentionTiling.CHUNKS
)
CPU = torch.device("cpu")
PLAN = plan_of(2, batch((0, 2, 2, (0, 2))), batch((0, 2, 2, (1, 3, 4))))
"""Both ranks have as many pieces, 6 and then 3: they fail at the same place, and none waits for the other."""


@pytest.fixture(scope="module")
def pool() -> Iterator[RankPool]:
    with RankPool() as pool:
        yield pool


def is_sharded(module: nn.Module) -> bool:
    """All weights FSDP2 knows of."""
    groups = [group for part in module.modules() if isinstance(part, FSDPModule) for group in groups_of(part)]
    return all(group is None or group.is_sharded for group in groups)


class Failing:
    """Raises at the `turn`-th call of a method of LayerRun: "after" in forward and where a segment runs again, the other in backward."""

    def __init__(self, name: str, turn: int) -> None:
        self.name, self.left, self.original = name, turn, getattr(LayerRun, name)

    def __enter__(self) -> None:
        failing = self

        def method(run: LayerRun, *args: Any, **options: Any) -> Any:
            failing.left -= 1
            if failing.left == 0:
                raise torch.OutOfMemoryError("CUDA out of memory (a test says so)")
            return failing.original(run, *args, **options)

        setattr(LayerRun, self.name, method)

    def __exit__(self, *_: object) -> None:
        setattr(LayerRun, self.name, self.original)


def interrupted(name: str, turn: int, barrier_free: bool, reduce_each: bool) -> tuple[bool, bool]:
    """On a rank: (whether a step after an interrupted one has the gradients of one without, bit by bit; whether all was let go)."""
    torch.set_num_threads(1)
    topology, store = build_topology(replicate=1, device="cpu"), StrictStore()
    model = build_model(
        hf_config("llama_deep"), POLICY, topology.mesh, device=CPU, compute_dtype=torch.float32, seed=0, loss_chunk_tokens=16, store=store
    )
    source = ListSource(*make_documents(LENGTHS))

    def step() -> list[Tensor]:
        works = read_step(source, 0, PLAN, topology.rank)
        count = count_targets(works, topology, CPU)
        setup = StepSetup(
            model=model, topology=topology, kernel=CpuKernel(), device=CPU, reduce_each=reduce_each, barrier_free=barrier_free
        )
        backward_step(setup, works, LanguageModelling(count, CPU))
        gradients = [parameter.grad.full_tensor() for parameter in model.parameters()]  # type: ignore[union-attr]
        model.zero_grad()
        return gradients

    clean = step()
    with Failing(name, turn), pytest.raises(torch.OutOfMemoryError):
        step()
    abandon_step(model)
    let_go = is_sharded(model) and not store.parcels and all(parameter.grad is None for parameter in model.parameters())
    return all(torch.equal(a, b) for a, b in zip(clean, step(), strict=True)), let_go


CASES = {
    "first forward": ("after", 20, False, False),
    "a segment that runs again": ("after", 40, False, False),
    "second forward": ("after", 55, False, False),
    "second backward": ("after_backward", 40, False, False),
    "second backward, the first reduced": ("before_backward", 40, False, True),
    "second backward, no barriers": ("after_backward", 40, True, False),
}
"""(what fails, which call of it, barrier_free, reduce_each)"""


@pytest.mark.parametrize("case", CASES)
def test_the_next_step_is_as_if_nothing_had_been(pool: RankPool, case: str) -> None:
    assert pool.run(interrupted, *CASES[case], ranks=2) == [(True, True)] * 2


def gathered_and_failed() -> list[bool]:
    """On a rank: whether weights are sharded again when what needed them whole has failed; inside they were whole."""
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    weights = shard_model(model, list(model), build_topology(replicate=1, device="cpu").mesh, compute_dtype=torch.float32)
    sharded = []
    with pytest.raises(ValueError, match="inside"), weights.gathered(model[0]):
        sharded.append(not is_sharded(model[0]))
        raise ValueError("inside")
    return [*sharded, is_sharded(model)]


def test_gathered_weights_go_with_an_exception(pool: RankPool) -> None:
    assert pool.run(gathered_and_failed, ranks=2) == [[True, True]] * 2
