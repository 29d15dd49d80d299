"""Ranks of stages: every collective inside a stage stays there, and groups count the stage's own ranks."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist

from efflaunch.parallel.sequence.ring import Ring
from efflaunch.parallel.topology import AlignedBlock, aligned_blocks, build_topology
from efflaunch.tests.ranks import RankPool


@pytest.fixture(scope="module")
def pool() -> Iterator[RankPool]:
    with RankPool() as pool:
        yield pool


def summed(group: dist.ProcessGroup) -> int:
    value = torch.tensor(1 << dist.get_rank())
    dist.all_reduce(value, group=group)
    return int(value)


def of_stage(stages: int, replicate: int) -> tuple[tuple[int, int, int], dict[str, int]]:
    """(stage, rank in it, its size), and which ranks each group sums over, as bits."""
    topology = build_topology(replicate=replicate, device="cpu", stages=stages)
    mesh = topology.mesh
    sums = {"world": summed(topology.world), "stage": summed(topology.stage)}
    sums |= {str(name): summed(mesh.get_group(name)) for name in mesh.mesh_dim_names or ()}
    sums |= {f"{block.first}+{block.degree}": summed(group) for block, group in sorted(topology.groups.items(), key=str)}
    assert (topology.stage_rank in topology.groups) is False and topology.group(topology.stage_rank, 1) is None
    return (topology.stage_index, topology.stage_rank, topology.stage_size), sums


def test_groups_of_two_stages_stay_inside_them(pool: RankPool) -> None:
    groups = pool.run(of_stage, 2, 1, ranks=4)
    assert [place for place, _ in groups] == [(0, 0, 2), (0, 1, 2), (1, 0, 2), (1, 1, 2)]
    for rank, (_, sums) in enumerate(groups):
        own = 0b0011 if rank < 2 else 0b1100
        assert sums == {"world": 0b1111, "stage": own, "shard": own, "0+2": own}


def test_replicas_of_a_stage_are_in_it(pool: RankPool) -> None:
    groups = pool.run(of_stage, 2, 2, ranks=4)
    for rank, (_, sums) in enumerate(groups):
        own = 0b0011 if rank < 2 else 0b1100
        assert sums["replicate"] == own and sums["shard"] == 1 << rank and sums["stage"] == own


def test_one_stage_is_the_world(pool: RankPool) -> None:
    for rank, (place, sums) in enumerate(pool.run(of_stage, 1, 2, ranks=4)):
        assert place == (0, rank, 4) and sums["stage"] == sums["world"] == sums["0+4"] == 0b1111
        assert sums["replicate"] == 0b0101 << rank % 2 and sums["shard"] == (0b0011 if rank < 2 else 0b1100)


def ring_of_second_stage() -> list[int]:
    """On ranks of the second stage: whose number came round the ring, by ranks of the run."""
    topology = build_topology(replicate=1, device="cpu", stages=2)
    group = topology.group(0, 2)
    ring = Ring(group, [0, 1], topology.stage_rank)
    incoming = torch.zeros(1, dtype=torch.int64)
    ring.start(torch.tensor([topology.rank]), incoming)
    ring.wait()
    return [topology.rank, int(incoming)]


def test_a_ring_counts_the_ranks_of_its_group(pool: RankPool) -> None:
    """Not those of the run: in the second stage they differ."""
    assert pool.run(ring_of_second_stage, ranks=4) == [[0, 1], [1, 0], [2, 3], [3, 2]]


def test_blocks_lie_inside_a_stage() -> None:
    assert AlignedBlock(0, 2) in aligned_blocks(2) and all(block.first + block.degree <= 6 for block in aligned_blocks(6))
