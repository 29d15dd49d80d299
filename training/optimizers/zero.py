"""Updates by DeepSpeed's ZeRO: the step's gradients and their norm are its own, AdamW is torch's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ...parallel.sharding.deepspeed import Zero
from ...parallel.sharding.deepspeed_state import FlatWeights, discard_gradients, gradient_norm, weights_changed
from .adamw import parameter_groups, set_learning_rate, weight_decay
from .config import OptimConfig
from .sharded_adamw import fused_adamw
from .updater import Gradients


def zero_optimizer(model: nn.Module, config: OptimConfig) -> Callable[[dict[str, nn.Parameter]], Any]:
    """What `shard_by_zero` makes the optimizer with. Call while `model` has whole shapes, if on the meta device.

    Of a partitioned parameter nothing says any more that it is a matrix: chosen later, none would decay.
    """
    names = parameter_groups(model)

    def build(parameters: dict[str, nn.Parameter]) -> Any:
        groups = [
            {"params": [parameters[name] for name in group], "name": kind, "weight_decay": weight_decay(kind, config)}
            for kind, group in names.items()
        ]
        # DeepSpeed knows this class by name, and hands it flat parts of its own.
        return fused_adamw(groups, config, torch.optim.AdamW)

    return build


class ZeroUpdater:
    """Updates once per step. ZeRO clips by optim.grad_clip, with torch's own formula, as it updates."""

    measures_first = False

    def __init__(self, zero: Zero, weights: FlatWeights) -> None:
        self._zero = zero
        self.weights: nn.Module = weights
        self.optimizer = zero.engine.optimizer.optimizer
        self._before_update: Callable[[], None] = _nothing

    def start(self, rate: float, before_update: Callable[[], None]) -> None:
        set_learning_rate(self.optimizer, rate)
        self._before_update = before_update

    def before_final_backward(self) -> None:
        """Does nothing: every gradient waits for `apply`."""

    def finish_measuring(self) -> Gradients:
        raise AssertionError("this updater does not measure first")

    def finish(self) -> Gradients:
        """The norm, known before anything is updated."""
        return Gradients(gradient_norm(self._zero))

    def apply(self) -> None:
        self._before_update()
        self._zero.engine.step()

    def discard(self) -> None:
        discard_gradients(self._zero)

    def weights_changed(self) -> None:
        weights_changed(self._zero)

    def state_dict(self) -> dict[str, float]:
        return {}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Does nothing: no step needs anything of the one before."""

    def close(self) -> None:
        """Does nothing: there are no threads."""


def _nothing() -> None:
    return None
