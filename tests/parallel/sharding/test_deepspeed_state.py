"""One state under any engine: what ZeRO saves FSDP2 restores bit by bit, and the other way, on one rank and on two."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist

from efflaunch.checkpoint.config import CheckpointConfig
from efflaunch.checkpoint.engine import CheckpointEngine
from efflaunch.parallel.sharding.fsdp2 import Fsdp2State
from efflaunch.tests.parity.engines_side import ZeroTrainer, whole
from efflaunch.tests.parity.optimizers_side import Trainer
from efflaunch.tests.parity.reference import reference_model
from efflaunch.tests.parity.test_parity import batch, make_documents, plan_of
from efflaunch.tests.ranks import RankPool

LENGTHS = (37, 5, 18)
OPTIM = {"grad_clip": 0.5}


@pytest.fixture(scope="module")
def pool() -> Iterator[RankPool]:
    with RankPool() as pool:
        yield pool


def _plan():
    ranks = dist.get_world_size()
    return plan_of(ranks, batch((0, ranks, ranks, (0, 1, 2))), lengths=LENGTHS)


class Run:
    """A model under an engine (stage 0: FSDP2), with a checkpoint engine."""

    def __init__(self, stage: int, weights, folder: Path) -> None:
        case = {"stage": stage, "policy": "recompute", "family": "llama_mha_tied", "dtype": "bfloat16", "optim": OPTIM}
        self.plan, self.zero = _plan(), stage > 0
        documents = make_documents(LENGTHS)
        if self.zero:
            self.trainer = ZeroTrainer(case, weights, *documents)
            self.state = self.trainer.state
        else:
            self.trainer = Trainer(case, weights, *documents, self.plan, OPTIM)
            self.state = Fsdp2State(self.trainer.model, self.trainer.updater.optimizer)
        self.checkpoints = CheckpointEngine(CheckpointConfig(name="test"), folder, state=self.state, metadata={})

    def step(self, rate: float) -> float:
        return self.trainer.step(self.plan, rate)[0] if self.zero else self.trainer.step(rate)[0]

    def numbers(self):
        tensors = self.state.tensors()
        if self.zero:
            return whole(tensors)
        return {key: np.array((each.full_tensor() if hasattr(each, "full_tensor") else each).detach()) for key, each in tensors.items()}

    def close(self) -> None:
        self.checkpoints.close()
        if self.zero:
            self.trainer.close()


def save(stage: int, weights, folder: Path):
    """What two steps left, and the loss of the next one."""
    run = Run(stage, weights, folder)
    for rate in (3e-3, 2e-3):
        run.step(rate)
    run.checkpoints.save(2, {})
    run.checkpoints.wait()
    numbers, loss = run.numbers(), run.step(1e-3)
    run.close()
    return numbers, loss


def resume(stage: int, weights, folder: Path):
    """What a restore into other weights left, and the losses of the next two steps."""
    run = Run(stage, {name: np.zeros_like(value) for name, value in weights.items()}, folder)
    restored = run.checkpoints.restore()
    assert restored is not None and restored.step == 2
    run.trainer.updater.weights_changed()
    numbers, losses = run.numbers(), [run.step(1e-3), run.step(1e-3)]
    run.close()
    return numbers, losses


FAST = [(1, 2, 0, 2), (3, 2, 0, 1), (0, 2, 3, 2), (2, 2, 3, 1)]
PAIRS = [*FAST, (2, 2, 0, 1), (3, 2, 0, 2), (0, 2, 1, 2), (0, 2, 2, 1), (0, 1, 3, 2), (3, 1, 1, 2)]
"""(stage, ranks) of the run that saves, and of the one that resumes; stage 0 is FSDP2."""


@pytest.mark.parametrize(
    ("saves", "ranks", "resumes", "ranks_then"), [pytest.param(*pair, marks=() if pair in FAST else pytest.mark.slow) for pair in PAIRS]
)
def test_a_run_resumes_under_another_engine(pool: RankPool, tmp_path: Path, saves: int, ranks: int, resumes: int, ranks_then: int) -> None:
    torch.set_num_threads(1)
    weights = {
        name: parameter.detach().numpy().copy() for name, parameter in reference_model("llama_mha_tied", torch.float32).named_parameters()
    }
    wanted, loss = pool.run(save, saves, weights, tmp_path, ranks=ranks)[0]
    got, losses = pool.run(resume, resumes, weights, tmp_path, ranks=ranks_then)[0]
    assert got.keys() == wanted.keys() and any(key.endswith(".exp_avg_sq") for key in got)
    assert all(np.array_equal(got[key], wanted[key]) and got[key].dtype == wanted[key].dtype for key in wanted)
    assert losses[0] == pytest.approx(loss, rel=2e-3) and losses[1] < losses[0]
