"""What one rank feeds to the model in one micro-batch: its slices of the group's documents, packed end to end.

Note: parts. A sequence of a plan is what lies in one group of one micro-batch. Mostly that is one document; a pair of answers is
two, each with positions from 0 and attention to itself alone. Plans count the tokens of the sequence; the group's layout is of
documents, so nothing below it knows of pairs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from ...parallel.sequence.layout import GroupLayout, Slices, group_layout
from ...parallel.sequence.plan import StepPlan
from .source import DataSource


@dataclass(frozen=True, slots=True)
class Part:
    """One document of the group: `length` tokens from `offset` on of sequence `sequence` of the step, its `number`-th document."""

    sequence: int
    number: int
    offset: int
    length: int


@dataclass(frozen=True, slots=True)
class PackedShard:
    """T resident tokens of one rank, all int64 (T,); T is 0 for a rank without work."""

    token_ids: np.ndarray
    target_ids: np.ndarray
    """Shifted once over the whole document; -100 where there is no loss."""
    position_ids: np.ndarray
    """Positions, from 0 in each document."""
    slices: Slices
    """Slices the tokens are: `slices[i].sequence` counts in `parts`."""
    parts: tuple[Part, ...] = ()
    """The group's documents in its own order."""

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    def by_row(self, number: Callable[[Part], int]) -> np.ndarray:
        """`number` of the document that each row lies in, int64 (T,)."""
        numbers = [number(self.parts[piece.sequence]) for piece in self.slices]
        return np.repeat(np.array(numbers, dtype=np.int64), [len(piece) for piece in self.slices])


def build_shard(source: DataSource, step: int, plan: StepPlan, micro_batch: int, rank: int) -> tuple[PackedShard, GroupLayout | None]:
    """Read what `rank` holds in a micro-batch of the step's plan; None for the layout where it is in no group."""
    assert plan.lengths == source.lengths(step), f"the plan was made for another step than {step}"
    group = plan.micro_batches[micro_batch].group_of(rank)
    if group is None:
        return _packed([], [], []), None
    parts = tuple(part for sequence in group.sequences for part in _parts(source, step, sequence))
    layout = group_layout(tuple(part.length for part in parts), ulysses=group.ulysses, ring=group.ring)
    slices = layout.member_slices[rank - group.first_rank]
    read = []
    for piece in slices:
        part = parts[piece.sequence]
        read.append(source.tokens(step, part.sequence, part.offset + piece.start, part.offset + piece.stop))
    positions = [np.arange(piece.start, piece.stop, dtype=np.int64) for piece in slices]
    return _packed([ids for ids, _ in read], [targets for _, targets in read], positions, slices, parts), layout


def rank_tokens(source: DataSource, step: int, plan: StepPlan, micro_batch: int) -> tuple[int, ...]:
    """Tokens that every rank holds in a micro-batch; 0 for those in no group. Reads no tokens."""
    counts = [0] * plan.world_size
    for group in plan.micro_batches[micro_batch].groups:
        lengths = tuple(part.length for sequence in group.sequences for part in _parts(source, step, sequence))
        layout = group_layout(lengths, ulysses=group.ulysses, ring=group.ring)
        for member in range(group.degree):
            counts[group.first_rank + member] = layout.num_tokens(member)
    return tuple(counts)


def _parts(source: DataSource, step: int, sequence: int) -> list[Part]:
    out, offset = [], 0
    for number, length in enumerate(source.parts(step, sequence)):
        out.append(Part(sequence, number, offset, length))
        offset += length
    return out


def _packed(
    ids: list[np.ndarray], targets: list[np.ndarray], positions: list[np.ndarray], slices: Slices = (), parts: tuple[Part, ...] = ()
) -> PackedShard:
    empty = np.zeros(0, dtype=np.int64)
    token_ids, target_ids, position_ids = (np.concatenate([empty, *arrays]) for arrays in (ids, targets, positions))
    return PackedShard(token_ids, target_ids, position_ids, slices, parts)
