"""One rank's work in each micro-batch of a step: its tokens, its group, and what of both a step's memory depends on."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist

from ..model.chunked_loss import IGNORE
from ..model.stage import Tokens
from ..parallel.sequence.layout import GroupLayout
from ..parallel.sequence.plan import Group, StepPlan
from ..parallel.topology import Topology
from .data.shard import PackedShard, build_shard, rank_tokens
from .data.source import DataSource


@dataclass(frozen=True, slots=True)
class MicroBatchWork:
    """This rank's work in one micro-batch; without a group it runs with zero rows so that collectives match."""

    shard: PackedShard
    layout: GroupLayout | None
    group: Group | None
    rank_tokens: tuple[int, ...] | None = None
    """Tokens of every rank, where ranks share experts."""


_NONE = np.zeros(0, dtype=np.int64)
EMPTY = MicroBatchWork(PackedShard(_NONE, _NONE, _NONE, ()), None, None)
"""No tokens: every collective over all ranks, and nothing else."""


def read_step(source: DataSource, step: int, plan: StepPlan, rank: int, *, shares_experts: bool = False) -> list[MicroBatchWork]:
    """This rank's work of each micro-batch; reads only the tokens it holds. `shares_experts`: layers exchange rows with other ranks."""
    return [
        MicroBatchWork(
            *build_shard(source, step, plan, index, rank),
            batch.group_of(rank),
            rank_tokens(source, step, plan, index) if shares_experts else None,
        )
        for index, batch in enumerate(plan.micro_batches)
    ]


def step_shape(micro_batches: Sequence[MicroBatchWork]) -> Hashable:
    """A key equal for steps whose tensors have the same sizes in the same order on this rank: an arena's plan is made for it.

    Per micro-batch: this rank's tokens with a target and without, the group's shape and place in it, its documents' lengths.
    """
    return tuple(
        None
        if work.group is None or work.layout is None
        else (
            work.shard.num_tokens,
            int(np.count_nonzero(work.shard.target_ids != IGNORE)),
            (work.group.degree, work.group.ulysses),
            work.shard.slices,
            work.layout.lengths,
        )
        for work in micro_batches
    )


def count_targets(micro_batches: Sequence[MicroBatchWork], topology: Topology, device: torch.device, *, number: int | None = None) -> int:
    """Target tokens of the whole step over all ranks of a stage: the one divisor of its loss. Collective over the stage.

    `number`: those of every sequence's document of that number alone (pairs: 0 is the chosen answer).
    """
    local = sum(_local_targets(work.shard, number) for work in micro_batches)
    total = torch.tensor(local, dtype=torch.int64, device=device)
    dist.all_reduce(total, group=topology.stage)
    return int(total)


def _local_targets(shard: PackedShard, number: int | None) -> int:
    counted = shard.target_ids != IGNORE
    return int(np.count_nonzero(counted if number is None else counted & (shard.by_row(lambda part: part.number) == number)))


def to_tokens(work: MicroBatchWork, device: torch.device, not_finite: torch.Tensor | None = None) -> Tokens:
    """The shard on the device; a row's document length comes from the group's layout."""
    lengths = np.zeros(0, dtype=np.int64)
    if work.layout is not None:
        lengths = np.repeat(
            [work.layout.lengths[piece.sequence] for piece in work.shard.slices], [len(piece) for piece in work.shard.slices]
        )
    arrays = work.shard.token_ids, work.shard.target_ids, work.shard.position_ids, lengths.astype(np.int64)
    token_ids, target_ids, position_ids, document_lengths = (torch.from_numpy(array).to(device) for array in arrays)
    return Tokens(token_ids, target_ids, position_ids, document_lengths, not_finite)
