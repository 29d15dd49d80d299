"""Finds where each parameter lies in the flat buffers of a ZeRO checkpoint, from shapes and lengths alone. Pure.

Follows what DeepSpeed 0.19 writes (runtime/zero/stage_1_and_2.py and stage3.py, `state_dict`; utils/zero_to_fp32.py reads it). Stages 1
and 2 flatten each group of the optimizer's parameters, one behind the other, and cut the whole evenly over ranks. Stage 3 cuts each
parameter evenly over ranks, the last part padded; a rank's parts lie one behind the other, in one buffer per sub-group.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

Shape = tuple[int, ...]


class LayoutError(ValueError):
    """Shapes and buffers are not of one checkpoint."""


@dataclass(frozen=True, slots=True)
class Run:
    """Numbers of a parameter that lie side by side in one rank's buffer."""

    rank: int
    buffer: int
    """Index of the buffer among the rank's."""
    first: int
    """Number of the buffer that it starts with."""
    count: int
    begin: int
    """Number of the parameter that it starts with."""


@dataclass(frozen=True, slots=True)
class _Segment:
    rank: int
    buffer: int
    length: int


def runs_of_groups(
    groups: Sequence[Mapping[str, Shape]], lengths: Sequence[Sequence[int]], paddings: Sequence[Sequence[int]] | None = None
) -> dict[str, tuple[Run, ...]]:
    """Stages 1 and 2: the runs of each parameter. LayoutError where buffers and shapes do not fit.

    `groups`: shapes by name, group by group; `lengths[rank][group]`: of the buffers; `paddings`: numbers behind each parameter.
    """
    runs: dict[str, tuple[Run, ...]] = {}
    if any(len(own) != len(groups) for own in lengths):
        raise LayoutError(f"{len(groups)} groups of parameters, and {sorted({len(own) for own in lengths})} buffers a rank")
    for index, shapes in enumerate(groups):
        segments = [_Segment(rank, index, own[index]) for rank, own in enumerate(lengths)]
        behind = [0] * len(shapes) if paddings is None or index >= len(paddings) else paddings[index]
        if len(behind) != len(shapes):
            raise LayoutError(f"{len(behind)} paddings of the {len(shapes)} parameters of group {index}")
        at = 0
        for (name, shape), padding in zip(shapes.items(), behind, strict=True):
            runs[name] = _cut(segments, at, math.prod(shape), 0)
            at += math.prod(shape) + padding
        # A group is padded to a multiple of twice the ranks; some of DeepSpeed's optimizers save it without.
        held = sum(segment.length for segment in segments)
        if not at - (behind[-1] if behind else 0) <= held < at + 2 * len(lengths):
            raise LayoutError(f"{held} numbers in the buffers of group {index}, and {at} of its parameters")
    return runs


def runs_of_partitions(shapes: Mapping[str, Shape], lengths: Sequence[Sequence[int]]) -> dict[str, tuple[Run, ...]]:
    """Stage 3: the runs of each parameter; `lengths[rank][buffer]`. LayoutError where buffers and shapes do not fit."""
    runs: dict[str, list[Run]] = {name: [] for name in shapes}
    ranks = len(lengths)
    for rank, own in enumerate(lengths):
        segments = [_Segment(rank, buffer, length) for buffer, length in enumerate(own)]
        at = 0
        for name, shape in shapes.items():
            numbers = math.prod(shape)
            part = -(-numbers // ranks)
            begin = min(part * rank, numbers)
            runs[name] += _cut(segments, at, min(part, numbers - begin), begin)
            at += part
        if sum(own) != at:
            raise LayoutError(f"{sum(own)} numbers in the buffers of rank {rank}, and {at} of its parts of {len(shapes)} parameters")
    return {name: tuple(each) for name, each in runs.items()}


def _cut(segments: Sequence[_Segment], start: int, count: int, begin: int) -> tuple[Run, ...]:
    """The runs of `count` numbers from `start` on of segments that lie one behind the other. LayoutError where they end before."""
    runs, at, stop = [], 0, start + count
    for segment in segments:
        low, high = max(start, at), min(stop, at + segment.length)
        if low < high:
            runs.append(Run(segment.rank, segment.buffer, low - at, high - low, begin + low - start))
        at += segment.length
    if stop > at:
        raise LayoutError(f"{at} numbers in the buffers, and a parameter that ends at number {stop}")
    return tuple(runs)
