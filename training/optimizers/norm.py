"""Computes the global gradient norm from gradients that need not all exist at one time."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from ...parallel.sharding.parts import groups_of_parts


class NormMeter:
    """Collects the norm of each parameter's local gradient as it comes; `total` is the norm of the whole gradient."""

    def __init__(self) -> None:
        self._norms: dict[Tensor, Tensor] = {}

    def add(self, parameter: Tensor, local_gradient: Tensor) -> None:
        """Measure one gradient, which may be gone afterwards. No communication, no synchronisation with a device."""
        # float64 for the sum over tensors only: products inside a tensor stay in its own precision, as in torch.
        self._norms[parameter] = torch.linalg.vector_norm(local_gradient).double()

    def total(self, parameters: Iterable[Tensor]) -> float:
        """The norm over those of `parameters` that were measured, summed in their order: bit-equal however they came. Collective.

        Counts each element of the full gradient once: squares are summed over the groups that hold different elements of a
        gradient, never over those it is replicated on.
        """
        alike: dict[tuple[ProcessGroup, ...], list[Tensor]] = defaultdict(list)
        for parameter in parameters:
            if parameter in self._norms:
                alike[groups_of_parts(parameter)].append(self._norms[parameter])
        total = 0.0
        for groups, norms in alike.items():
            squares = torch.stack(norms).square().sum()
            for group in groups:
                dist.all_reduce(squares, group=group)
            total += squares.item()
        return math.sqrt(total)

    def is_finite(self, parameters: Sequence[Tensor]) -> Tensor:
        """Whether the local gradients of `parameters` are all finite: a scalar on their device."""
        return torch.stack([self._norms[parameter] for parameter in parameters]).isfinite().all()


def clip_scale(norm: float, max_norm: float | None) -> float:
    """The factor for gradients: 1 where nothing is to be clipped. max_norm / (norm + 1e-6), as in torch."""
    if max_norm is None or not math.isfinite(norm):
        return 1.0
    return min(1.0, max_norm / (norm + 1e-6))
