"""Ranks, aligned blocks and the process groups made from them before the first step."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from typing import TYPE_CHECKING, Any

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


def aligned_blocks(world_size: int, degrees: Collection[int] | None = None) -> tuple[AlignedBlock, ...]:
    """Every aligned power-of-two block of two or more ranks that lies inside the world, small ones first; of `degrees` alone, if given.

    A world that is not a power of two simply has fewer large blocks; at most world_size - 1 in all.
    """
    out, degree = [], 2
    while degree <= world_size:
        if degrees is None or degree in degrees:
            out += [AlignedBlock(first, degree) for first in range(0, world_size - degree + 1, degree)]
        degree *= 2
    return tuple(out)


@dataclass(frozen=True)
class PipelineRanks:
    """Ranks with the same place in every stage, one of each: what one of them computes goes on to the next."""

    ranks: tuple[int, ...]
    """Their numbers in the run, by stage."""
    column: ProcessGroup
    """All of them, for what concerns the whole model."""
    forward: ProcessGroup
    """All of them, for activations."""
    backward: ProcessGroup
    """All of them, for gradients of activations: on a communicator of their own, they wait for no activations."""
    ends: ProcessGroup | None
    """Those of the first and the last stage, for weights that both have; None in the stages between."""


@dataclass(frozen=True)
class Topology:
    """This rank's place and the communicators it may use; made once, by every rank in the same order.

    Note: which ranks. The run's ranks are cut into stages of equally many, next to each other; a stage's ranks hold the same layers.
    Step plans, groups and blocks count the ranks of a stage (`stage_rank`), everything between processes those of the run (`rank`).
    With one stage the two are the same. Every collective names its group: `world`, `stage`, a sequence group (`group`), or those
    of `mesh` for weights; none goes to torch's default group.
    """

    rank: int
    """Number of this rank in the run."""
    world_size: int
    """Ranks of the run."""
    device: str
    mesh: DeviceMesh
    """Mesh of the stage: `(replicate, shard)` where there are replicas, else `(shard,)`."""
    world: ProcessGroup
    """All ranks of the run."""
    stage: ProcessGroup
    """Ranks that hold the same layers; `world` itself where there is one stage."""
    groups: dict[AlignedBlock, ProcessGroup] = field(default_factory=dict)
    """Sequence groups this rank is in, by their ranks in the stage."""
    num_stages: int = 1
    pipeline: PipelineRanks | None = None
    """This rank's partners in the other stages; None: there is one stage."""
    experts: DeviceMesh | None = None
    """Mesh `(replicate, expert_shard, expert)` of the stage, whose last axis are the ranks that share experts; None: every rank has all."""

    @property
    def shares_experts(self) -> bool:
        """Whether the experts of a layer are spread over ranks."""
        return self.experts is not None

    @property
    def stage_size(self) -> int:
        """Ranks of each stage."""
        return self.world_size // self.num_stages

    @property
    def stage_index(self) -> int:
        """Which stage this rank is in."""
        return self.rank // self.stage_size

    @property
    def stage_rank(self) -> int:
        """This rank in its stage: what step plans count."""
        return self.rank % self.stage_size

    def group(self, first: int, degree: int) -> ProcessGroup | None:
        """The communicator of an aligned block of the stage this rank belongs to; None for a block of one."""
        return None if degree == 1 else self.groups[AlignedBlock(first, degree)]


def groups_of(topology: Topology) -> Iterator[ProcessGroup]:
    """Yield every group this rank is in, some of them more than once."""
    yield topology.world
    yield topology.stage
    yield from topology.groups.values()
    for mesh in (topology.mesh, topology.experts):
        yield from [] if mesh is None else mesh.get_all_groups()
    pipeline = topology.pipeline
    if pipeline is not None:
        yield from (group for group in (pipeline.column, pipeline.forward, pipeline.backward, pipeline.ends) if group is not None)


def set_timeout(topology: Topology, timeout_s: float) -> None:
    """Have collectives that begin from now on end after `timeout_s`, in every group of this rank. Not collective."""
    from torch.distributed.distributed_c10d import _set_pg_timeout

    for group in groups_of(topology):
        _set_pg_timeout(timedelta(seconds=timeout_s), group)


def whole_world() -> ProcessGroup:
    """The group of all ranks of the run, for collectives that come before there is a topology; after init_process_group."""
    import torch.distributed as dist

    world = dist.group.WORLD
    assert world is not None, "init_process_group comes first"
    return world


def build_topology(
    *,
    replicate: int,
    device: str,
    stages: int = 1,
    experts: int = 1,
    timeout_s: float = 1800.0,
    degrees: Collection[int] | None = None,
) -> Topology:
    """Make the mesh and the aligned groups of every stage. Collective: all ranks call it at the same point, after init_process_group.

    `replicate`: copies of a stage's weights. `experts`: ranks next to each other that share the experts of a layer. `timeout_s`: of
    all collectives, those of `world` too. `degrees`: ranks of the groups that sequences can have; None: every power of two. On GPUs
    this rank's has been set. The world is a multiple of `stages` x `replicate` x `experts`.
    """
    import torch.distributed as dist

    world = whole_world()
    rank, world_size = dist.get_rank(world), dist.get_world_size(world)
    size, timeout = world_size // stages, timedelta(seconds=timeout_s)
    assert size * stages == world_size and size % replicate == 0, "ranks divide over stages and replicas"
    mesh, stage, groups = _mesh(device, stages, replicate, size), world, {}
    # Every rank takes part in making every group, its own or not.
    for first in range(0, world_size, size):
        mine = first <= rank < first + size
        if stages > 1:
            made = dist.new_group(list(range(first, first + size)), timeout=timeout)
            stage = made if mine else stage
        for block in aligned_blocks(size, degrees):
            made = dist.new_group([first + member for member in block.ranks], timeout=timeout, **_options(device))
            if mine and rank - first in block.ranks:
                groups[block] = made
    pipeline = _pipeline_ranks(rank, stages, size, timeout) if stages > 1 else None
    expert_mesh = _expert_mesh(device, stages, replicate, size, experts)
    topology = Topology(rank, world_size, device, mesh, world, stage, groups, stages, pipeline, expert_mesh)
    # Those of meshes have torch's default: ten minutes with NCCL.
    set_timeout(topology, timeout_s)
    return topology


def _options(device: str) -> dict[str, Any]:
    """How groups of sequences are made: with NCCL alone on GPUs, whose communicator then is there at once; they send nothing else."""
    import torch

    return {"backend": "nccl", "device_id": torch.device("cuda", torch.cuda.current_device())} if device == "cuda" else {}


def _pipeline_ranks(rank: int, stages: int, size: int, timeout: timedelta) -> PipelineRanks:
    """Make the groups of every place in a stage; returns those of this rank's."""
    import torch.distributed as dist

    mine: PipelineRanks | None = None
    for place in range(size):
        ranks = [stage * size + place for stage in range(stages)]
        # Not by the members alone: torch then names groups by how many a rank is in, and those of the ends are in one more.
        column, forward, backward, ends = (
            dist.new_group(members, timeout=timeout) for members in (ranks, ranks, ranks, [ranks[0], ranks[-1]])
        )
        if place == rank % size:
            mine = PipelineRanks(tuple(ranks), column, forward, backward, ends if rank in (ranks[0], ranks[-1]) else None)
    assert mine is not None
    return mine


def _expert_mesh(device: str, stages: int, replicate: int, size: int, experts: int) -> DeviceMesh | None:
    """Mesh of this rank's stage for weights of experts."""
    from torch.distributed.device_mesh import init_device_mesh

    if experts == 1:
        return None
    assert size % (replicate * experts) == 0, "ranks of a stage divide over replicas and ranks that share experts"
    shape, names = (replicate, size // replicate // experts, experts), ("replicate", "expert_shard", "expert")
    if stages == 1:
        return init_device_mesh(device, shape, mesh_dim_names=names)
    return init_device_mesh(device, (stages, *shape), mesh_dim_names=("stage", *names))[names]


def _mesh(device: str, stages: int, replicate: int, size: int) -> DeviceMesh:
    """Mesh of this rank's stage."""
    from torch.distributed.device_mesh import init_device_mesh

    axes = {"stage": stages, "replicate": replicate, "shard": size // replicate}
    used = {name: length for name, length in axes.items() if length > 1 or name == "shard"}
    mesh = init_device_mesh(device, tuple(used.values()), mesh_dim_names=tuple(used))
    return mesh[tuple(name for name in used if name != "stage")] if stages > 1 else mesh
