"""The global gradient norm, from gradients that need not all exist at one time."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor


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

        Counts each element of the full gradient once: squares are summed over the mesh axes a gradient is sharded on, never over
        those it is replicated on.
        """
        alike: dict[tuple[DeviceMesh | None, tuple[int, ...]], list[Tensor]] = defaultdict(list)
        for parameter in parameters:
            if parameter in self._norms:
                alike[sharding(parameter)].append(self._norms[parameter])
        total = 0.0
        for (mesh, axes), norms in alike.items():
            squares = torch.stack(norms).square().sum()
            for axis in axes:
                assert mesh is not None
                dist.all_reduce(squares, group=mesh.get_group(axis))
            total += squares.item()
        return math.sqrt(total)

    def is_finite(self, parameters: Sequence[Tensor]) -> Tensor:
        """Whether the local gradients of `parameters` are all finite: a scalar on their device."""
        return torch.stack([self._norms[parameter] for parameter in parameters]).isfinite().all()


def sharding(tensor: Tensor) -> tuple[DeviceMesh | None, tuple[int, ...]]:
    """The mesh and those of its axes that hold different elements; (None, ()) for a plain tensor."""
    if not isinstance(tensor, DTensor):
        return None, ()
    assert not any(placement.is_partial() for placement in tensor.placements), "gradients are reduced before they are clipped"
    return tensor.device_mesh, tuple(axis for axis, placement in enumerate(tensor.placements) if placement.is_shard())


def local(tensor: Tensor) -> Tensor:
    """This rank's part, without a copy."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def clip_scale(norm: float, max_norm: float | None) -> float:
    """What gradients are multiplied by: 1 where nothing is to be clipped. max_norm / (norm + 1e-6), as in torch."""
    if max_norm is None or not math.isfinite(norm):
        return 1.0
    return min(1.0, max_norm / (norm + 1e-6))
