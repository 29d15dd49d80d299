"""Where a rank is in its step: what an out-of-memory report names. A few attribute writes a layer; no tensors, no clock."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(slots=True)
class Position:
    """Kept up to date by the trunk (model/build.py), the layer executor (memory/executor/layer.py) and the loop (training/trainer.py)."""

    phase: str = "start"
    """`forward`, `loss`, `backward`, `weight gradients` (put off by a pipeline), `optimizer`; anything else is shown as it is."""
    layer: int | None = None
    """The decoder layer that runs, from 0."""

    listener: Callable[[str, int | None], None] | None = None
    """Called at every change."""

    def at(self, phase: str, layer: int | None = None) -> None:
        """Set where the rank is from now on."""
        self.phase, self.layer = phase, layer
        if self.listener is not None:
            self.listener(phase, layer)

    def __str__(self) -> str:
        return self.phase if self.layer is None else f"{self.phase} of layer {self.layer}"
