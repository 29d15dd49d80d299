"""Moments in bfloat16 and 8 bits against torchao's own optimizer, and their way through a checkpoint."""

from __future__ import annotations

import builtins
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from efflaunch.checkpoint.config import CheckpointConfig
from efflaunch.checkpoint.engine import CheckpointEngine
from efflaunch.errors import ConfigError
from efflaunch.estimate.optimizer_residency import residency_of
from efflaunch.parallel.sharding.fsdp2 import Fsdp2State
from efflaunch.parallel.sharding.parts import local
from efflaunch.tests.ranks import RankPool
from efflaunch.tests.training.small import full
from efflaunch.training.optimizers.adamw import build_optimizer, set_learning_rate
from efflaunch.training.optimizers.build import build_updater
from efflaunch.training.optimizers.config import OptimConfig, StateDevice, StateDtype, Update
from efflaunch.training.optimizers.masters import host_weights

LOW = [StateDtype.BFLOAT16, StateDtype.INT8]


def config(**changes: Any) -> OptimConfig:
    return OptimConfig(**({"name": "test", "lr": 1e-2, "weight_decay": 0.1, "grad_clip": None} | changes))


@pytest.fixture(scope="module")
def pool() -> Iterator[RankPool]:
    with RankPool() as pool:
        yield pool


def net() -> nn.Sequential:
    """One tensor of whole blocks on one and two ranks, one that is too small."""
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(128, 256), nn.Tanh(), nn.Linear(256, 3))


def backward(model: nn.Module, step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    model(torch.randn(8, 128, generator=generator)).square().mean().backward()


def states_of(optimizer: torch.optim.Optimizer, parameter: Tensor) -> dict[str, Tensor]:
    return {key: local(optimizer.plain_state(value)) for key, value in optimizer.state[parameter].items()}  # type: ignore[attr-defined]


def test_eight_bits_are_torchaos_own() -> None:
    from torchao.optim import AdamW8bit

    ours, theirs = net(), net()
    optimizer = build_optimizer(ours, config(state_dtype=StateDtype.INT8, weight_decay=0.0))
    reference = AdamW8bit(theirs.parameters(), lr=1e-2, betas=(0.9, 0.95), weight_decay=0.0)
    for step in range(3):
        set_learning_rate(optimizer, 1e-2 * (step + 1))
        for group in reference.param_groups:
            group["lr"].fill_(1e-2 * (step + 1))
        backward(ours, step)
        backward(theirs, step)
        optimizer.step()
        with torch.compiler.set_stance("force_eager"):
            reference.step()
        optimizer.zero_grad()
        reference.zero_grad()
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(mine, other)
    first = optimizer.state[ours[0].weight]["exp_avg"]
    assert first.codes.dtype == torch.uint8 and first.codes.numel() == 128 * 256
    assert optimizer.state[ours[2].weight]["exp_avg"].dtype == torch.float32, "768 numbers are too few to quantise"


@pytest.mark.parametrize("kind", LOW, ids=lambda kind: kind.value)
def test_three_steps_stay_near_exact_adamw(kind: StateDtype) -> None:
    """Not equal, and said so: within a hundredth of the way the weights went, on average."""
    exact, rounded, first = net(), net(), net()
    for model, precision in ((exact, StateDtype.FLOAT32), (rounded, kind)):
        optimizer = build_optimizer(model, config(state_dtype=precision))
        for step in range(3):
            backward(model, step)
            optimizer.step()
            optimizer.zero_grad()
    for mine, wanted, begin in zip(rounded.parameters(), exact.parameters(), first.parameters(), strict=True):
        way = (wanted - begin).norm()
        assert (mine - wanted).norm() <= 0.1 * way
    assert not torch.equal(rounded[0].weight, exact[0].weight)


class _Trained:
    def __init__(self, fields: dict[str, Any], folder: Path) -> None:
        self.model = net()
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        fully_shard(self.model[0], mesh=mesh)
        fully_shard(self.model, mesh=mesh)
        settings = config(**fields)
        self.weights: nn.Module = self.model
        if settings.state_device is StateDevice.HOST:
            self.weights = host_weights(self.model, torch.float32)
            with torch.no_grad():
                for mine, own in zip(self.weights.parameters(), self.model.parameters(), strict=True):
                    local(mine).copy_(local(own))
        self.updater = build_updater(self.model, self.weights, settings, torch.device("cpu"))
        self.optimizer: Any = self.updater.optimizer
        self.engine: Any = CheckpointEngine(
            CheckpointConfig(name="test"), folder, state=Fsdp2State(self.weights, self.optimizer), metadata={"seed": 0, "layout": "test"}
        )

    def step(self, step: int) -> None:
        self.updater.start(1e-2, lambda: None)
        self.updater.before_final_backward()
        backward(self.model, step)
        self.updater.finish()
        self.updater.apply()

    def tensors(self) -> dict[str, Tensor]:
        state = {name: full(parameter) for name, parameter in self.weights.named_parameters()}
        plain = getattr(self.optimizer, "plain_state", lambda value: value)
        for name, parameter in self.weights.named_parameters():
            state |= {f"{name}.{key}": full(plain(value)) for key, value in self.optimizer.state[parameter].items()}
        return state


def _run(fields: dict[str, Any], folder: Path, steps: int, *, resume: bool = False) -> dict[str, Tensor]:
    trained = _Trained(fields, folder)
    first = 0
    if resume:
        state = trained.engine.restore()
        assert state is not None
        first = state.step
        trained.updater.weights_changed()
    for step in range(first, steps):
        trained.step(step)
    if not resume:
        trained.engine.save(steps, {})
        trained.engine.wait() if hasattr(trained.engine, "wait") else None
    trained.updater.close()
    return trained.tensors()


@pytest.mark.parametrize("kind", LOW, ids=lambda kind: kind.value)
@pytest.mark.parametrize("states", list(StateDevice), ids=lambda states: states.value)
def test_checkpoints_hold_float32_and_a_run_resumes(pool: RankPool, tmp_path: Path, kind: StateDtype, states: StateDevice) -> None:
    """Bit-equal with bfloat16. The 8-bit grid is not symmetric: a block whose largest number is negative is rounded once more."""
    fields = {"state_dtype": kind, "state_device": states, "update": Update.BACKWARD}
    whole = pool.run(_run, fields, tmp_path / "whole", 4, ranks=2)[0]
    saved = pool.run(_run, fields, tmp_path / "run", 2, ranks=2)[0]
    assert all(value.dtype == torch.float32 for value in saved.values())
    got = pool.run(_resumed, fields, tmp_path / "run", 4, ranks=2)[0]
    for name, first in dict(net().named_parameters()).items():
        assert kind is StateDtype.INT8 or torch.equal(got[name], whole[name])
        assert (got[name] - whole[name]).norm() <= 0.02 * (whole[name] - first).norm()
    exact = pool.run(_resumed, {}, tmp_path / "run", 2, ranks=1)[0]
    assert [name for name in saved if not torch.equal(exact[name], saved[name])] == [], "float32 on one rank reads what 2 ranks had"


def _resumed(fields: dict[str, Any], folder: Path, steps: int) -> dict[str, Tensor]:
    return _run(fields, folder, steps, resume=True)


def test_without_torchao_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def missing(name: str, *rest: Any, **named: Any) -> Any:
        if name.startswith("torchao"):
            raise ImportError("No module named 'torchao'")
        return real(name, *rest, **named)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(ConfigError, match=r"(?s)8bit without torchao.*pip install 'efflaunch\[lowbit\]'"):
        build_optimizer(net(), config(state_dtype=StateDtype.INT8))


def test_the_ledger_counts_what_there_is() -> None:
    model = nn.Linear(256, 64, bias=False)
    optimizer = build_optimizer(model, config(state_dtype=StateDtype.INT8))
    model(torch.ones(2, 256)).sum().backward()
    optimizer.step()
    state = optimizer.state[model.weight]
    held = sum(state[key].codes.numel() + 4 * state[key].scale.numel() for key in ("exp_avg", "exp_avg_sq"))
    assert residency_of(config(state_dtype=StateDtype.INT8)).state_bytes(4) * model.weight.numel() == held
    assert residency_of(config(state_dtype=StateDtype.BFLOAT16)).state_bytes(4) == 4
    assert residency_of(config(state_device=StateDevice.HOST)).state_bytes(4) == 12
