"""What a training loop calls around a step's backward pass, wherever the optimizer lives and whenever it updates."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import nn


@dataclass(frozen=True, slots=True)
class Gradients:
    """What is known of a step's gradients after its backward pass, alike on every rank."""

    norm: float
    """Global L2 norm, before clipping."""
    first_bad: str | None = None
    """The first module in backward whose gradients are not all finite."""
    partly_applied: bool = False
    """Modules that came before it have been updated."""


class Updater(Protocol):
    """Owns the optimizer of one rank. Every rank calls every method, in the same order; a step is

    start -> [measuring pass] -> backward pass -> finish -> apply.
    """

    weights: nn.Module
    """What checkpoints hold: parameters of the model's names and sharding, in the precision they are updated in."""
    optimizer: torch.optim.Optimizer

    @property
    def measures_first(self) -> bool:
        """This step needs a backward pass of its own for the norm, before the one that updates."""
        ...

    def start(self, rate: float, before_update: Callable[[], None]) -> None:
        """A step begins. `before_update` is called once in it, when weights and states are about to change."""
        ...

    def before_final_backward(self) -> None:
        """The pass begins in which gradients of the step become complete."""
        ...

    def finish_measuring(self) -> Gradients:
        """After the measuring pass: its norm is what this step is clipped by; its gradients are gone. Collective."""
        ...

    def finish(self) -> Gradients:
        """After the backward pass. Collective."""
        ...

    def apply(self) -> None:
        """What was not updated in backward is; gradients are gone, the model's weights are the new ones."""
        ...

    def discard(self) -> None:
        """Instead of `finish` and `apply`: gradients are gone, and what was not updated in backward stays as it is."""
        ...

    def weights_changed(self) -> None:
        """`weights` were written from outside (initialised, loaded, restored): the model gets them."""
        ...

    def state_dict(self) -> dict[str, float]:
        """What the next step needs of this one, for a checkpoint's `extra`."""
        ...

    def load_state_dict(self, state: dict[str, float]) -> None:
        """The inverse of `carry`."""
        ...

    def close(self) -> None:
        """Threads end; the optimizer's state stays readable."""
        ...
