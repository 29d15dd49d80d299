"""Saves killed at any moment: what is committed is whole, and the newest committed one restores."""

from __future__ import annotations

import os
import random
import signal
import threading
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from efflaunch.checkpoint import files
from efflaunch.checkpoint.config import CheckpointConfig
from efflaunch.checkpoint.engine import CheckpointEngine
from efflaunch.parallel.sharding.fsdp2 import Fsdp2State
from efflaunch.tests.ranks import RankDiedError, RankPool
from efflaunch.tests.training.small import Small, full, shard
from efflaunch.training.optimizers.adamw import build_optimizer
from efflaunch.training.optimizers.config import OptimConfig


def _engine(folder: Path) -> tuple[Small, CheckpointEngine]:
    model = shard(Small())
    optimizer = build_optimizer(model, OptimConfig(name="test", lr=1e-3))
    return model, CheckpointEngine(CheckpointConfig(name="test"), folder, state=Fsdp2State(model, optimizer), metadata={})


def _fill(model: Small, step: int) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(float(step))


def _restored_step(folder: Path) -> int:
    """The newest step, after checking that every weight is of that step; 0 where there is none."""
    model, engine = _engine(folder)
    restored = engine.restore()
    if restored is None:
        return 0
    assert restored.skipped == () and restored.extra == {"step": restored.step}
    for name, parameter in model.named_parameters():
        assert bool((full(parameter) == restored.step).all()), name
    return restored.step


def _save_until_killed(folder: Path, victim: int, num_saves: int, after_s: float) -> None:
    """Restores, then saves step after step; rank `victim` dies `after_s` seconds after its `num_saves`-th save is durable."""
    step = _restored_step(folder)
    model, engine = _engine(folder)
    last = step + num_saves
    while True:
        if step == last and dist.get_rank() == victim:
            threading.Timer(after_s, os.kill, (os.getpid(), signal.SIGKILL)).start()
        step += 1
        _fill(model, step)
        engine.save(step, {"step": step})
        engine.wait()


@pytest.mark.parametrize("seed", [0])
def test_a_rank_killed_while_saving_loses_nothing_that_was_committed(tmp_path: Path, seed: int) -> None:
    chance = random.Random(seed)
    committed = 0
    with RankPool() as pool:
        for trial in range(6):
            with pytest.raises(RankDiedError, match=f"rank {trial % 2} died"):
                pool.run(_save_until_killed, tmp_path, trial % 2, trial % 3 + 1, chance.uniform(0, 0.2), ranks=2)
            infos = files.scan(tmp_path)
            assert all(info.is_whole for info in infos)
            newest = infos[-1].step if infos else 0
            assert newest >= committed + trial % 3 + 1
            committed = newest
        first, second = pool.run(_restored_step, tmp_path, ranks=2)
        # The last attempt may have been finished by its writers; then this start has committed it.
        assert first == second and first in (committed, committed + 1)
    assert committed > 0 and not list(tmp_path.glob("*.tmp*"))
