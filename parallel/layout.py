"""Layout: how one configuration lies over the ranks, before any batch is known. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from ..cluster.config import Machines
from ..units import format_tokens
from .config import ModelShape, ParallelConfig, check_parallel
from .sequence.degrees import choose_degree, choose_ulysses


@dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    """World = stages x replicate x shard for weights; the ranks of a stage hold groups of `sp_degree` = ulysses x ring for sequences."""

    num_nodes: int
    ranks_per_node: int
    replicate: int
    shard: int
    sp_degree: int
    ulysses: int
    tokens_per_rank: int
    """Most tokens of a rank in one micro-batch."""
    num_micro_batches: int
    """Micro-batches of a step whose sequences all have the longest length."""
    sequences_per_group: int
    """Longest sequences one group holds in one micro-batch of that step."""
    stages: int = 1
    """Stages of the pipeline, each of as many ranks."""

    @property
    def world_size(self) -> int:
        return self.num_nodes * self.ranks_per_node

    @property
    def stage_size(self) -> int:
        """Ranks of each stage."""
        return self.world_size // self.stages

    @property
    def ring(self) -> int:
        return self.sp_degree // self.ulysses

    @property
    def num_groups(self) -> int:
        """Sequence groups that run side by side in a stage."""
        return self.stage_size // self.sp_degree

    def __str__(self) -> str:
        groups = f"{self.num_groups} group{'s' * (self.num_groups > 1)} of {self.sp_degree} ({self.ulysses} Ulysses x {self.ring} ring)"
        weights = f"weights {self.replicate} x {self.shard} (replicate x shard)"
        ranks = f"{self.world_size} ranks on {self.num_nodes} node{'s' * (self.num_nodes > 1)}"
        stages = f"; {self.stages} stages of {self.stage_size} ranks" * (self.stages > 1)
        return f"{ranks}{stages}; {weights}; {groups}, {format_tokens(self.tokens_per_rank)} tokens a rank"


def solve_layout(parallel: ParallelConfig, cluster: Machines, spec: ModelShape, *, max_seq_len: int, global_batch_tokens: int) -> Layout:
    """The layout every step of the run uses; ConfigError with the nearest that works where there is none."""
    check_parallel(parallel, cluster, spec)
    stages = parallel.pipeline.stages
    ranks = cluster.num_nodes * cluster.ranks_per_node // stages
    degree = choose_degree(
        max_seq_len=max_seq_len, tokens_per_rank=parallel.tokens_per_rank, world_size=ranks, requested=parallel.sp_degree
    )
    ulysses = choose_ulysses(
        degree=degree,
        num_heads=spec.num_heads,
        ranks_per_node=cluster.ranks_per_node,
        scheme=parallel.scheme,
        requested=parallel.ulysses_degree,
    )
    sequences, groups = max(1, global_batch_tokens // max_seq_len), ranks // degree
    # The solver opens as few micro-batches as capacity allows and spreads sequences evenly over their groups.
    most = degree * parallel.tokens_per_rank // max_seq_len
    least = max(-(-sequences // (groups * most)), min(parallel.pipeline.micro_batches or 1, -(-sequences // groups)))
    micro_batches = least if parallel.pipeline.micro_batches else _least_time(sequences, groups, least, stages)
    return Layout(
        num_nodes=cluster.num_nodes,
        ranks_per_node=cluster.ranks_per_node,
        replicate=parallel.replicate,
        shard=ranks // parallel.replicate,
        sp_degree=degree,
        ulysses=ulysses,
        tokens_per_rank=parallel.tokens_per_rank,
        num_micro_batches=micro_batches,
        sequences_per_group=-(-sequences // (groups * micro_batches)),
        stages=stages,
    )


def _least_time(sequences: int, groups: int, least: int, stages: int) -> int:
    """Micro-batches, `least` or more, with which equal sequences go through the stages soonest; the fewest such.

    Each micro-batch takes a stage as long as it has sequences a group; a step is as long as that many, and stages - 1 more.
    """
    most = max(least, min(-(-sequences // groups), 8 * stages)) if stages > 1 else least
    return min(range(least, most + 1), key=lambda count: ((count + stages - 1) * -(-sequences // (groups * count)), count))
