"""Computes the global gradient norm from gradients that need not all exist at one time."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from ...parallel.sharding.parts import groups_of_parts, memory_of


@dataclass(frozen=True, slots=True)
class NormScope:
    """What one rank's parameters are a part of, where stages of a pipeline have others."""

    column: ProcessGroup | None = None
    """A rank of every stage, over which squares are summed once more; None: every parameter is here."""
    repeated: frozenset[Tensor] = frozenset()
    """Parameters that another stage has as well, and counts."""


class NormMeter:
    """Collects the norm of each parameter's local gradient as it comes; `total` is the norm of the whole gradient."""

    def __init__(self, scope: NormScope | None = None) -> None:
        self._norms: dict[Tensor, Tensor] = {}
        self._scope = scope or NormScope()

    def add(self, parameter: Tensor, local_gradient: Tensor) -> None:
        """Measure one gradient, which may be gone afterwards. No communication, no synchronisation with a device."""
        # float64 for the sum over tensors only: products inside a tensor stay in its own precision, as in torch.
        self._norms[parameter] = torch.linalg.vector_norm(local_gradient).double()

    def total(self, parameters: Iterable[Tensor]) -> float:
        """The norm over those of `parameters` that were measured, summed in their order: bit-equal however they came. Collective.

        Counts each element of the full gradient once: squares are summed over the groups that hold different elements of a
        gradient, never over those it is replicated on. Then over stages.
        """
        alike: dict[tuple[ProcessGroup, ...], list[Tensor]] = defaultdict(list)
        for parameter in (everything := list(parameters)):
            if parameter in self._norms and parameter not in self._scope.repeated:
                alike[groups_of_parts(parameter)].append(self._norms[parameter])
        total = 0.0
        for groups, norms in alike.items():
            squares = torch.stack(norms).square().sum()
            for group in groups:
                dist.all_reduce(squares, group=group)
            total += squares.item()
        if self._scope.column is not None:
            everywhere = torch.tensor(total, dtype=torch.float64, device=memory_of(everything[0]).device)
            dist.all_reduce(everywhere, group=self._scope.column)
            total = everywhere.item()
        return math.sqrt(total)

    def is_finite(self, parameters: Sequence[Tensor]) -> Tensor:
        """Whether the local gradients of `parameters` are all finite: a scalar on their device."""
        return torch.stack([self._norms[parameter] for parameter in parameters]).isfinite().all()


def clip_scale(norm: float, max_norm: float | None) -> float:
    """The factor for gradients: 1 where nothing is to be clipped. max_norm / (norm + 1e-6), as in torch."""
    if max_norm is None or not math.isfinite(norm):
        return 1.0
    return min(1.0, max_norm / (norm + 1e-6))
