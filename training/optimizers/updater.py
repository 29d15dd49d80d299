"""The protocol a training loop calls around backward, wherever the optimizer lives and whenever it updates."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import nn


@dataclass(frozen=True, slots=True)
class Gradients:
    """The norm and the faults of a step's gradients after its backward pass, alike on every rank."""

    norm: float
    """Global L2 norm, before clipping."""
    first_bad: str | None = None
    """The first module in backward whose gradients are not all finite."""
    partly_applied: bool = False
    """Whether modules that came before it have been updated."""


class Updater(Protocol):
    """Owns the optimizer of one rank. Every rank calls every method, in the same order; a step is

    start -> [measuring pass] -> backward pass -> finish -> apply.
    """

    weights: nn.Module
    """What checkpoints hold: parameters of the model's names and sharding, in the precision they are updated in."""
    optimizer: torch.optim.Optimizer

    @property
    def measures_first(self) -> bool:
        """Whether this step needs a backward pass of its own for the norm, before the one that updates."""
        ...

    def start(self, rate: float, before_update: Callable[[], None]) -> None:
        """Begin a step. `before_update` is called once in it, when weights and states are about to change."""
        ...

    def before_final_backward(self) -> None:
        """Announce the backward pass in which the step's gradients become complete."""
        ...

    def finish_measuring(self) -> Gradients:
        """End the measuring pass: its norm is what this step is clipped by; its gradients are gone. Collective."""
        ...

    def finish(self) -> Gradients:
        """End the backward pass and return the norm of its gradients. Collective."""
        ...

    def apply(self) -> None:
        """Update what was not updated in backward; gradients are gone, the model's weights are the new ones."""
        ...

    def discard(self) -> None:
        """Drop the step instead of `finish` and `apply`: gradients are gone, and what was not updated in backward stays."""
        ...

    def weights_changed(self) -> None:
        """Give the model `weights` that were written from outside (initialised, loaded, restored)."""
        ...

    def state_dict(self) -> dict[str, float]:
        """What the next step needs of this one, for a checkpoint's `extra`."""
        ...

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Restore what `state_dict` returned."""
        ...

    def close(self) -> None:
        """End the threads; the optimizer's state stays readable."""
        ...
