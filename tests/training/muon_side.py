"""Ranks of tests/training/test_muon.py: a small sharded model under Muon, its checkpoints, and one process with torch's own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from efflaunch.checkpoint.config import CheckpointConfig
from efflaunch.checkpoint.engine import CheckpointEngine
from efflaunch.parallel.sharding.fsdp2 import Fsdp2State
from efflaunch.tests.training.small import backward, full, plain_model, shard
from efflaunch.training.optimizers.build import build_updater
from efflaunch.training.optimizers.config import MuonScale, OptimConfig

RATES = (1e-2, 2e-2, 3e-2)


def config(**changes: Any) -> OptimConfig:
    return OptimConfig(**({"name": "test", "algorithm": "muon", "lr": RATES[0], "weight_decay": 0.3, "grad_clip": None} | changes))


class Run:
    def __init__(self, settings: OptimConfig, replicate: int = 1, folder: Path | None = None, seed: int = 0) -> None:
        self.model = plain_model(torch.float64, seed=seed)
        if dist.is_initialized():
            shard(self.model, replicate)
        self.updater = build_updater(self.model, self.model, settings, torch.device("cpu"))
        if folder is not None:
            state = Fsdp2State(self.model, self.updater.optimizer)
            self.engine = CheckpointEngine(CheckpointConfig(name="test"), folder, state=state, metadata={"seed": 0, "layout": "test"})

    def step(self, step: int) -> float:
        self.updater.start(RATES[step], lambda: None)
        self.updater.before_final_backward()
        backward(self.model, step, scale=3.0)
        norm = self.updater.finish().norm
        self.updater.apply()
        return norm

    def tensors(self) -> dict[str, Tensor]:
        state = {name: full(value) for name, value in self.model.named_parameters()}
        for name, parameter in self.model.named_parameters():
            state |= {f"{name}.{key}": full(value) for key, value in self.updater.optimizer.state[parameter].items()}
        return state


def trained(settings: OptimConfig, replicate: int, steps: int = 3, folder: Path | None = None) -> dict[str, Tensor]:
    """Weights and states after some steps, saved where there is a folder."""
    run = Run(settings, replicate, folder)
    for step in range(steps):
        run.step(step)
    if folder is not None:
        run.engine.save(steps, {})
        run.engine.close()
    return run.tensors()


def resumed(settings: OptimConfig, replicate: int, folder: Path) -> dict[str, Tensor]:
    """The third step from a checkpoint after two, on weights that start otherwise."""
    run = Run(settings, replicate, folder, seed=1)
    state = run.engine.restore()
    assert state is not None
    for step in range(state.step, 3):
        run.step(step)
    return run.tensors()


def is_muons(name: str, parameter: Tensor) -> bool:
    return "layers." in name and parameter.ndim == 2


def with_torchs_own(scale: MuonScale, max_norm: float | None = None, ratio: float = 1.0) -> dict[str, Tensor]:
    """The same in one process by torch.optim.Muon and torch.optim.AdamW, not fused."""
    model = plain_model(torch.float64)
    named = list(model.named_parameters())
    muon = torch.optim.Muon([p for n, p in named if is_muons(n, p)], weight_decay=0.3, adjust_lr_fn=scale.value)
    # The only other matrix is the embedding, which is not decayed.
    adamw = torch.optim.AdamW([p for n, p in named if not is_muons(n, p)], betas=(0.9, 0.95), weight_decay=0.0, foreach=False)
    for step, rate in enumerate(RATES):
        backward(model, step, scale=3.0)
        if max_norm is not None:
            nn.utils.clip_grad_norm_(model.parameters(), max_norm, foreach=False)
        for optimizer, factor in ((muon, ratio), (adamw, 1.0)):
            optimizer.param_groups[0]["lr"] = rate * factor
            optimizer.step()
            optimizer.zero_grad()
    state = {name: full(parameter) for name, parameter in named}
    for name, parameter in named:
        for optimizer in (muon, adamw):
            state |= {f"{name}.{key}": value for key, value in optimizer.state.get(parameter, {}).items()}
    return state
