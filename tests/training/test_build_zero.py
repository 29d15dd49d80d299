"""A configuration's model under ZeRO starts from the very weights that it starts from under FSDP2, random or read."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist

from efflaunch.launcher.config.compose import compose
from efflaunch.memory.policy import MemoryPolicy
from efflaunch.parallel.topology import build_topology
from efflaunch.tests.parity.engines_side import whole
from efflaunch.tests.ranks import RankPool
from efflaunch.training.engines import builder_of

TINY = ("+experiment=quickstart",)


@pytest.fixture(scope="module")
def pool() -> Iterator[RankPool]:
    with RankPool() as pool:
        yield pool


def first_weights(typed: tuple[str, ...]) -> dict[str, np.ndarray]:
    """Whole float32 weights of a model that was just built, and those it computes with where they are whole."""
    os.environ["LOCAL_RANK"] = str(dist.get_rank())
    torch.set_num_threads(1)
    config = compose([*TINY, *typed])
    trained = builder_of(config)(config, MemoryPolicy(), build_topology(replicate=1, device="cpu").mesh, torch.device("cpu"))
    if config.engine.stage is None:
        return {name: np.array(each.full_tensor().detach()) for name, each in trained.model.named_parameters()}
    found = whole(dict(trained.updater.weights.named_parameters()))
    if config.engine.stage < 3:
        for name, parameter in trained.model.named_parameters():
            assert torch.equal(parameter.detach().float(), torch.from_numpy(found[name]).to(parameter.dtype).float()), name
    trained.weights._engine.destroy()
    return found


@pytest.mark.parametrize("ranks", [1, 2])
def test_first_weights_are_those_of_any_engine(pool: RankPool, ranks: int) -> None:
    wanted = pool.run(first_weights, ("train.dtype=bfloat16",), ranks=ranks)[0]
    for stage in (1, 3):
        got = pool.run(first_weights, ("train.dtype=bfloat16", "engine=deepspeed", f"engine.stage={stage}"), ranks=ranks)[0]
        assert got.keys() == wanted.keys() and all(np.array_equal(got[name], wanted[name]) for name in wanted)


def test_weights_are_read_from_files_as_under_any_engine(pool: RankPool, tmp_path: Path) -> None:
    from efflaunch.tests.parity.reference import reference_model

    reference_model("llama", torch.float32).save_pretrained(tmp_path)
    typed = ("model=pretrained", f"model.path={tmp_path}")
    wanted = pool.run(first_weights, typed, ranks=2)[0]
    got = pool.run(first_weights, (*typed, "engine=deepspeed", "engine.stage=3"), ranks=2)[0]
    assert got.keys() == wanted.keys() and all(np.array_equal(got[name], wanted[name]) for name in wanted)
