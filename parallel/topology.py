"""Ranks, aligned blocks and the process groups made from them before the first step."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import timedelta
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh


@dataclass(frozen=True, slots=True)
class AlignedBlock:
    """Ranks first ... first + degree - 1; `first` is a multiple of `degree`, a power of two."""

    first: int
    degree: int

    @property
    def ranks(self) -> tuple[int, ...]:
        return tuple(range(self.first, self.first + self.degree))


def aligned_blocks(world_size: int) -> tuple[AlignedBlock, ...]:
    """Every aligned power-of-two block of two or more ranks that lies inside the world, small ones first.

    A world that is not a power of two simply has fewer large blocks; at most world_size - 1 in all.
    """
    out, degree = [], 2
    while degree <= world_size:
        out += [AlignedBlock(first, degree) for first in range(0, world_size - degree + 1, degree)]
        degree *= 2
    return tuple(out)


@dataclass(frozen=True)
class Topology:
    """This rank's place and the communicators it may use; made once, by every rank in the same order."""

    rank: int
    world_size: int
    device: str
    mesh: DeviceMesh
    """`(replicate, shard)` where there are replicas, else `(shard,)`."""
    groups: dict[AlignedBlock, ProcessGroup] = field(default_factory=dict)

    def group(self, first: int, degree: int) -> ProcessGroup | None:
        """The communicator of an aligned block this rank belongs to; None for a block of one."""
        return None if degree == 1 else self.groups[AlignedBlock(first, degree)]


def build_topology(*, replicate: int, device: str, timeout_s: float = 600.0) -> Topology:
    """Make the mesh and every aligned group. Collective: all ranks call it at the same point, after init_process_group."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh

    rank, world_size = dist.get_rank(), dist.get_world_size()
    if replicate > 1:
        mesh = init_device_mesh(device, (replicate, world_size // replicate), mesh_dim_names=("replicate", "shard"))
    else:
        mesh = init_device_mesh(device, (world_size,), mesh_dim_names=("shard",))
    groups = {}
    for block in aligned_blocks(world_size):
        made = dist.new_group(list(block.ranks), timeout=timedelta(seconds=timeout_s))
        if rank in block.ranks:
            groups[block] = made
    return Topology(rank, world_size, device, mesh, groups)
