"""Optimizers of torch.optim and pytorch-optimizer on sharded weights: each rank updates its own parts, as if they were all.

Only what works element by element is let in (algorithms.py), so this is exact. What the library keeps for all weights at once, a count
of steps, is stored as a state of each weight, so checkpoints hold it like any other.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import ConfigError
from ...parallel.sharding.parts import like, memory_of
from .algorithms import EXTRA, LIBRARY
from .config import OptimConfig

STEP = "step"


def library_class(algorithm: str) -> type[torch.optim.Optimizer]:
    """The optimizer's class; ConfigError where its library is not installed."""
    known = LIBRARY[algorithm]
    try:
        found: type[torch.optim.Optimizer] = getattr(import_module(known.module), known.name)
    except ImportError as error:
        raise ConfigError(
            "optim.algorithm",
            found=f"{algorithm} without {known.module} ({error})",
            expected="the package that has it",
            hint=f"{EXTRA}, or optim.algorithm=adamw",
        ) from error
    return found


class LibraryOptimizer(torch.optim.Optimizer):
    """Over the groups of `build_optimizer`; states are sharded as their weights are."""

    def __init__(self, groups: list[dict[str, Any]], config: OptimConfig) -> None:
        super().__init__(groups, {"lr": config.lr})
        known = LIBRARY[config.algorithm]
        self._parts = {p: nn.Parameter(memory_of(p), requires_grad=True) for group in self.param_groups for p in group["params"]}
        inner: list[dict[str, Any]] = [
            {"params": [self._parts[p] for p in group["params"]], "weight_decay": group["weight_decay"]} for group in self.param_groups
        ]
        given = {"lr": config.lr, "betas": tuple(config.betas), **({"eps": config.eps} if known.has_eps else {}), **known.arguments}
        self._inner = library_class(config.algorithm)(inner, **given)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update what has a gradient. No communication."""
        for group, inner in zip(self.param_groups, self._inner.param_groups, strict=True):
            inner["lr"] = float(group["lr"])
            for parameter in group["params"]:
                self._lend(parameter, inner)
        self._inner.step()
        for group, inner in zip(self.param_groups, self._inner.param_groups, strict=True):
            for parameter in group["params"]:
                self._take_back(parameter, inner)

    def _lend(self, parameter: nn.Parameter, inner: dict[str, Any]) -> None:
        """Give the library this rank's part: of the weight, which may have been replaced, of its gradient, and of its states."""
        part = self._parts[parameter]
        part.data = memory_of(parameter)
        part.grad = None if parameter.grad is None else memory_of(parameter.grad)
        states = {key: memory_of(value) for key, value in self.state.get(parameter, {}).items()}
        if STEP in states and not self._counts_by_weight(part):
            inner[STEP] = int(states.pop(STEP))
        self._inner.state[part] = states

    def _take_back(self, parameter: nn.Parameter, inner: dict[str, Any]) -> None:
        part = self._parts[parameter]
        part.grad = None
        states = self._inner.state[part]
        kept = {key: like(parameter, value) if value.shape == part.shape and part.ndim else value for key, value in states.items()}
        if kept and STEP not in kept:
            kept[STEP] = torch.tensor(float(inner[STEP]))
        self.state[parameter] = kept

    def _counts_by_weight(self, part: Tensor) -> bool:
        """Whether the library keeps the number of steps with each weight, as torch does."""
        return type(self._inner).__module__.startswith("torch.")


def stored_numbers(optimizer: torch.optim.Optimizer) -> float:
    """Numbers that an optimizer keeps for each weight, by a step on gradients of the weights' own size; scalars are not counted.

    For parameters on the meta device, where nothing is computed and nothing takes memory.
    """
    weights = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for parameter in weights:
        parameter.grad = torch.empty_like(parameter)
    optimizer.step()
    kept = sum(value.numel() for p in weights for value in optimizer.state[p].values() if value.ndim)
    return kept / sum(parameter.numel() for parameter in weights)
