"""DeepSpeed as it is loaded and told: quietly, with nothing compiled; no rank has more than one module whole under stage 3."""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist

from efflaunch.errors import EXIT_RETRY, EfflaunchError
from efflaunch.parallel.sharding import deepspeed as engine
from efflaunch.parallel.sharding.deepspeed import load_deepspeed
from efflaunch.tests.parity.engines_side import ZeroTrainer
from efflaunch.tests.parity.reference import reference_model
from efflaunch.tests.parity.test_parity import make_documents
from efflaunch.tests.ranks import RankPool


@pytest.fixture(scope="module")
def pool() -> Iterator[RankPool]:
    with RankPool() as pool:
        yield pool


def load() -> tuple[str, bool, str]:
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        deepspeed = load_deepspeed(torch.device("cpu"))
        from deepspeed.comm import comm
        from deepspeed.utils import logger

        logger.warning("a word of its own")
    assert deepspeed.comm.get_world_size() == dist.get_world_size()
    return printed.getvalue(), comm.cdb.shm_comm_op is None, os.environ["DS_ACCELERATOR"]


def test_nothing_is_compiled_or_printed(pool: RankPool) -> None:
    assert pool.run(load, ranks=2) == [("", True, "cpu")] * 2


def build(stage: int, family: str, weights) -> tuple[int, int, bool]:
    """The most numbers alive in whole parameters while it is built, those after, and whether tied parameters still are."""
    alive: list[int] = []
    real = engine._materialise

    def watched(model, modules, device, then=None):
        def look(module):
            alive.append(sum(each.numel() for each in model.parameters() if not each.is_meta))
            if then is not None:
                then(module)

        real(model, modules, device, look)

    engine._materialise = watched
    try:
        case = {"stage": stage, "policy": "recompute", "family": family, "dtype": "float32"}
        trainer = ZeroTrainer(case, weights, *make_documents((5, 9)))
    finally:
        engine._materialise = real
    model = trainer.model
    after = sum(each.numel() for each in model.parameters())
    tied = model.lm_head.weight is model.model.embed_tokens.weight
    with pytest.raises(EfflaunchError, match="efflaunch resume") as error:
        trainer.trained.weights.forget()
    assert error.value.exit_code == EXIT_RETRY, "a start from the last checkpoint can go on"
    trainer.close()
    return max(alive), after, tied


@pytest.mark.parametrize("family", ["llama", "llama_mha_tied"])
def test_stage_three_has_one_module_whole_at_most(pool: RankPool, family: str) -> None:
    model = reference_model(family, torch.float32)
    weights = {name: each.detach().numpy().copy() for name, each in model.named_parameters()}
    largest = max(sum(each.numel() for each in module.parameters()) for module in (*model.model.layers, model.model.embed_tokens))
    most, after, tied = pool.run(build, 3, family, weights, ranks=2)[0]
    assert most == largest and after == 0 and tied == (family == "llama_mha_tied")
    _, whole, tied = pool.run(build, 1, family, weights, ranks=2)[0]
    assert whole == sum(each.numel() for each in model.parameters()) and tied == (family == "llama_mha_tied")
