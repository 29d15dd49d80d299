"""Ranks of tests/training/test_residency.py: a small sharded model, its updater and a checkpoint engine over it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from efflaunch.checkpoint.config import CheckpointConfig
from efflaunch.checkpoint.engine import CheckpointEngine
from efflaunch.parallel.sharding.fsdp2 import Fsdp2State
from efflaunch.parallel.sharding.parts import local
from efflaunch.tests.training.small import backward, full, plain_model, shard
from efflaunch.training.optimizers.build import build_updater
from efflaunch.training.optimizers.config import OptimConfig, StateDevice
from efflaunch.training.optimizers.masters import host_weights
from efflaunch.training.optimizers.updater import Gradients


class Run:
    """`seed` makes first weights that differ from saved ones."""

    def __init__(self, config: OptimConfig, *, folder: Path | None = None, replicate: int = 1, seed: int = 0) -> None:
        self.model = shard(plain_model(seed=seed), replicate) if dist.is_initialized() else plain_model(seed=seed)
        self.weights: nn.Module = self.model
        if config.state_device is StateDevice.HOST:
            self.weights = host_weights(self.model, torch.float32)
            with torch.no_grad():
                for host, own in zip(self.weights.parameters(), self.model.parameters(), strict=True):
                    local(host).copy_(local(own))
        self.spoil = False
        self.model.layers[0].up.weight.register_post_accumulate_grad_hook(self._spoil)
        self.updater = build_updater(self.model, self.weights, config, torch.device("cpu"))
        self.engine: Any = None
        if folder is not None:
            settings = CheckpointConfig(name="test")
            self.engine = CheckpointEngine(
                settings, folder, state=Fsdp2State(self.weights, self.updater.optimizer), metadata={"seed": 0, "layout": "test"}
            )

    def restore(self) -> int:
        restored = self.engine.restore()
        assert restored is not None
        self.updater.weights_changed()
        self.updater.load_state_dict(restored.extra.get("updater", {}))
        return int(restored.step)

    def save(self, step: int) -> None:
        self.engine.save(step, {"updater": self.updater.state_dict()})

    def _spoil(self, parameter: Tensor) -> None:
        if self.spoil and (not dist.is_initialized() or dist.get_rank() == dist.get_world_size() - 1):
            local(parameter.grad).view(-1)[0] = float("nan")

    def step(self, step: int) -> Gradients:
        """One update. With `spoil`, one number of one gradient of the first layer is none, in the last rank's shard only."""
        self.updater.start(1e-2 * (step + 1), lambda: None)
        if self.updater.measures_first:
            self.updater.before_final_backward()
            backward(self.model, step, scale=3.0)
            self.updater.finish_measuring()
        self.updater.before_final_backward()
        backward(self.model, step, scale=3.0)
        state = self.updater.finish()
        if math.isfinite(state.norm):
            self.updater.apply()
        return state

    def tensors(self) -> dict[str, Tensor]:
        """Whole weights and optimizer states."""
        state = {name: full(value) for name, value in self.weights.named_parameters()}
        plain = getattr(self.updater.optimizer, "plain_state", lambda value: value)
        for name, parameter in self.weights.named_parameters():
            state |= {f"{name}.{key}": full(plain(value)) for key, value in self.updater.optimizer.state[parameter].items()}
        return state
