"""Which part of a whole tensor this rank holds, whichever engine sharded it. A plain tensor is whole.

Note: strided shards. With a tensor axis and a shard axis on one dim, torch has `_StridedShard` in place of `Shard`, whose
`is_shard()` is False. So what is asked here is whether a tensor is replicated on a mesh axis, never whether it is sharded.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from ...checkpoint.flat import Flat, Piece


def is_sharded(tensor: Tensor) -> bool:
    """Whether an engine gave this rank a part of the tensor; the part may be all of it, or nothing."""
    return isinstance(tensor, DTensor | Flat)


def local(tensor: Tensor) -> Tensor:
    """This rank's part, without a copy; autograd sees it."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def memory_of(tensor: Tensor) -> Tensor:
    """This rank's part, without a copy, of its own class and outside any graph; of a flattened tensor a run of numbers (n,)."""
    if isinstance(tensor, Flat):
        return tensor.run.detach()
    # What to_local() returns; but that is an operation of autograd: slow where many are asked for, and it wraps the part once more.
    return (tensor._local_tensor if isinstance(tensor, DTensor) else tensor).detach()


def offsets(tensor: Tensor) -> tuple[int, ...]:
    """Where this rank's part starts in the whole tensor, by dim; it is one box (a flattened tensor's is not: `pieces`)."""
    assert not isinstance(tensor, Flat), "a run of numbers is several boxes"
    if not isinstance(tensor, DTensor):
        return (0,) * tensor.ndim
    _, start = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    return tuple(start)


def pieces(tensor: Tensor) -> list[Piece]:
    """This rank's memory of a tensor, box by box, and where each starts in the whole: a `checkpoint.reader.Pieces`."""
    return tensor.pieces() if isinstance(tensor, Flat) else [(memory_of(tensor), offsets(tensor))]


def slices(tensor: Tensor) -> tuple[slice, ...]:
    """This rank's part of the whole tensor, as an index, where it is one box; also right for `_StridedShard`."""
    return tuple(slice(start, start + size) for start, size in zip(offsets(tensor), memory_of(tensor).shape, strict=True))


def indexed(tensor: Tensor) -> list[tuple[Tensor, tuple[slice, ...]]]:
    """This rank's memory of a tensor, box by box, and each as an index of the whole."""
    return [
        (memory, tuple(slice(start, start + size) for start, size in zip(begin, memory.shape, strict=True)))
        for memory, begin in pieces(tensor)
    ]


def like(tensor: Tensor, part: Tensor) -> Tensor:
    """`part` as this rank's part of a whole that is sharded as `tensor` is, on the part's own device."""
    assert not isinstance(tensor, Flat), "an engine that flattens has its own states"
    if not isinstance(tensor, DTensor):
        return part
    # Not from_local: it would move the part to the mesh's device.
    return DTensor(part, tensor._spec, requires_grad=False)  # type: ignore[call-arg]


@torch.no_grad()
def write_shard(target: Tensor, full: Tensor) -> None:
    """This rank's part of `full` into a sharded (or plain) tensor."""
    if not is_sharded(target):
        target.detach().copy_(full)
        return
    for memory, index in indexed(target):
        memory.copy_(full[index])


def groups_of_parts(tensor: Tensor) -> tuple[ProcessGroup, ...]:
    """Groups of ranks that hold different elements, one for each such mesh axis; summing over all counts each element once.

    The groups of one mesh are the same objects for all its tensors. AssertionError for sums that are not reduced yet.
    """
    if not isinstance(tensor, DTensor):
        return ()
    assert not any(placement.is_partial() for placement in tensor.placements), "a sum over ranks is not reduced yet"
    split = (axis for axis, placement in enumerate(tensor.placements) if not placement.is_replicate())
    return tuple(tensor.device_mesh.get_group(axis) for axis in split)


@dataclass(frozen=True, slots=True)
class RowSplit:
    """How the rows of a matrix, or the matrices of a stack, lie over the ranks of one group."""

    group: ProcessGroup | None
    """None: this rank has all of each matrix it has, and nobody beside replicas has any of them."""
    dim: int = 0
    """The dim that is cut; of a stack 0, whole matrices, or 1, rows of each."""
    ranges: tuple[range, ...] = ()
    """Of that dim, by rank of the group; the last ones may be empty."""


def row_split(tensor: Tensor) -> RowSplit:
    """How a matrix or a stack of matrices is cut. AssertionError for cuts of columns, or of rows by two axes.

    A stack that is cut on both dims (experts over ranks, experts.py) is split by rows; what this rank has of dim 0 is its own stack.
    """
    if not isinstance(tensor, DTensor):
        return RowSplit(None)
    cuts: dict[int, int] = {}
    for axis, placement in enumerate(tensor.placements):
        if not placement.is_replicate() and tensor.device_mesh.size(axis) > 1:
            assert isinstance(placement, Shard) and placement.dim not in cuts, f"cut by {tensor.placements}"
            cuts[placement.dim] = axis
    if not cuts:
        return RowSplit(None)
    dim = max(cuts)
    assert dim < tensor.ndim - 1, f"columns are cut by {tensor.placements}"
    size, ranks = tensor.shape[dim], tensor.device_mesh.size(cuts[dim])
    each = -(-size // ranks)
    ranges = tuple(range(min(size, rank * each), min(size, (rank + 1) * each)) for rank in range(ranks))
    return RowSplit(tensor.device_mesh.get_group(cuts[dim]), dim, ranges)


def sharding(tensor: Tensor) -> Hashable:
    """Changes with how a tensor lies over the ranks, or its device where it is whole; the same for alike tensors."""
    if isinstance(tensor, Flat):
        return (tensor.begin, tensor.run.numel(), tensor.device.type)
    if not isinstance(tensor, DTensor):
        return tensor.device.type
    return (tensor.placements, tuple(tensor.device_mesh.shape), tuple(memory_of(tensor).shape))
