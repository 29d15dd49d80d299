"""What one rank feeds to the model in one micro-batch: its slices of the group's sequences, packed end to end."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ...parallel.sequence.layout import GroupLayout, Slices, group_layout
from ...parallel.sequence.plan import StepPlan
from .source import DataSource


@dataclass(frozen=True, slots=True)
class PackedShard:
    """T resident tokens of one rank, all int64 (T,); T is 0 for a rank without work."""

    token_ids: np.ndarray
    target_ids: np.ndarray
    """Shifted once over the whole document; -100 where there is no loss."""
    position_ids: np.ndarray
    """From 0 in each sequence."""
    slices: Slices
    """Where the tokens lie: `slices[i].sequence` counts in the group's own order."""

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)


def build_shard(source: DataSource, step: int, plan: StepPlan, micro_batch: int, rank: int) -> tuple[PackedShard, GroupLayout | None]:
    """Read what `rank` holds in a micro-batch of the step's plan; None for the layout where it is in no group."""
    assert plan.lengths == source.lengths(step), f"the plan was made for another step than {step}"
    group = plan.micro_batches[micro_batch].group_of(rank)
    if group is None:
        return _packed([], [], []), None
    layout = group_layout(tuple(plan.lengths[i] for i in group.sequences), ulysses=group.ulysses, ring=group.ring)
    slices = layout.member_slices[rank - group.first_rank]
    read = [source.tokens(step, group.sequences[piece.sequence], piece.start, piece.stop) for piece in slices]
    positions = [np.arange(piece.start, piece.stop, dtype=np.int64) for piece in slices]
    return _packed([ids for ids, _ in read], [targets for _, targets in read], positions, slices), layout


def _packed(ids: list[np.ndarray], targets: list[np.ndarray], positions: list[np.ndarray], slices: Slices = ()) -> PackedShard:
    empty = np.zeros(0, dtype=np.int64)
    token_ids, target_ids, position_ids = (np.concatenate([empty, *parts]) for parts in (ids, targets, positions))
    return PackedShard(token_ids, target_ids, position_ids, slices)
