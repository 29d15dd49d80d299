"""What checkpoints hold of FSDP2's model and optimizer: whole under plain names, also from two mesh axes, read by any other layout."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from efflaunch.checkpoint.config import CheckpointConfig
from efflaunch.checkpoint.engine import CheckpointEngine
from efflaunch.checkpoint.reader import whole
from efflaunch.checkpoint.state import MODEL, weights_of
from efflaunch.parallel.sharding.fsdp2 import Fsdp2State
from efflaunch.parallel.sharding.parts import memory_of, pieces
from efflaunch.tests.parallel.sharding.pair import Pair, two_axes
from efflaunch.tests.ranks import RankPool


@pytest.fixture(scope="module")
def pool() -> Iterator[RankPool]:
    with RankPool() as pool:
        yield pool


def trained(model: nn.Module, steps: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    """After AdamW steps on gradients that are a function of the weights."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    for _ in range(steps):
        for parameter in model.parameters():
            parameter.grad = (parameter * 0.5 + 1).detach()
        optimizer.step()
    return model, optimizer


def numbers(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    tensors = Fsdp2State(model, optimizer).tensors()
    return {key: (value.full_tensor() if hasattr(value, "full_tensor") else value).detach().clone() for key, value in tensors.items()}


def engine(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> CheckpointEngine:
    return CheckpointEngine(CheckpointConfig(name="test"), folder, state=Fsdp2State(model, optimizer), metadata={})


def save(folder: Path) -> dict[str, Tensor]:
    model, optimizer = trained(two_axes(), 2)
    saving = engine(folder, model, optimizer)
    saving.save(2, {})
    saving.wait()
    saving.close()
    return numbers(model, optimizer)


def restore(folder: Path) -> dict[str, Tensor]:
    """On two axes, or plain on one rank; other weights before."""
    model, optimizer = trained(two_axes() if dist.get_world_size() == 4 else Pair(), 0)
    with torch.no_grad():
        for parameter in model.parameters():
            memory_of(parameter).zero_()
    loading = engine(folder, model, optimizer)
    restored = loading.restore()
    loading.close()
    assert restored is not None and restored.step == 2
    return numbers(model, optimizer)


def test_what_two_axes_save_any_layout_restores(pool: RankPool, tmp_path: Path) -> None:
    wanted = pool.run(save, tmp_path, ranks=4)[0]
    plain, optimizer = trained(Pair(), 2)
    assert all(torch.equal(wanted[key], value) for key, value in numbers(plain, optimizer).items())
    for ranks in (4, 1):
        for restored in pool.run(restore, tmp_path, ranks=ranks):
            assert restored.keys() == wanted.keys()
            assert all(torch.equal(restored[key], value) for key, value in wanted.items())


def refused() -> str:
    """What reading into a sharded tensor as if it were whole says."""
    with pytest.raises(TypeError) as error:
        whole(next(two_axes().parameters()))
    return str(error.value)


def test_a_sharded_tensor_is_not_taken_for_a_whole_one(pool: RankPool) -> None:
    """Its memory is a part of it: filled as if it were all, a rank would hold other rows, silently."""
    assert "DTensor may be a part" in pool.run(refused, ranks=4)[0]
    value = torch.zeros(3, 2)
    assert [at for _, at in whole(value)] == [at for _, at in pieces(value)] == [(0, 0)]
    assert whole(nn.Parameter(value))[0][0].shape == (3, 2)


def test_weights_are_separated_from_the_optimizer(tmp_path: Path) -> None:
    model, optimizer = trained(Pair(), 1)
    tensors = Fsdp2State(model, optimizer).tensors()
    assert set(weights_of(tensors)) == {f"{MODEL}{name}" for name, _ in model.named_parameters()}
    assert len(tensors) == 3 * (1 + 3)
