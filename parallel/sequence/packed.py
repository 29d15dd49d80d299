"""A StepPlan as one vector of int64 whose size is known from the number of sequences alone: one broadcast carries it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from .plan import Group, MicroBatch, StepPlan

if TYPE_CHECKING:
    import numpy as np

SOURCES = ("static", "adaptive", "greedy", "late")
BOUNDS = ("", "staircase", "class LP", "class MILP")
_HEADER, _GROUP = 5, 6


def packed_size(num_sequences: int) -> int:
    """Entries of a packed plan: groups hold at least one sequence each, so there are at most as many."""
    return _HEADER + (_GROUP + 1) * num_sequences


def pack_plan(plan: StepPlan) -> np.ndarray:
    """(packed_size,) int64. Seconds travel as the bits of float64, so every rank has the same."""
    import numpy as np

    out = np.zeros(packed_size(len(plan.lengths)), dtype=np.int64)
    groups = [(index, group) for index, batch in enumerate(plan.micro_batches) for group in batch.groups]
    seconds = np.array([_or_nan(plan.predicted_s), _or_nan(plan.lower_bound_s), *(_or_nan(group.predicted_s) for _, group in groups)])
    bits = seconds.view(np.int64)
    out[:_HEADER] = (len(groups), SOURCES.index(plan.source), BOUNDS.index(plan.bound), bits[0], bits[1])
    rows = [(index, group.first_rank, group.degree, group.ulysses, len(group.sequences)) for index, group in groups]
    table = out[_HEADER : _HEADER + _GROUP * len(groups)].reshape(-1, _GROUP)
    table[:, :5], table[:, 5] = np.array(rows, dtype=np.int64).reshape(-1, 5), bits[2:]
    members = [sequence for _, group in groups for sequence in group.sequences]
    out[_HEADER + _GROUP * len(groups) :][: len(members)] = members
    return out


def unpack_plan(packed: np.ndarray, world_size: int, lengths: Sequence[int]) -> StepPlan:
    """The plan that was packed, of sequences of these lengths."""
    import numpy as np

    num_groups, source, bound = (int(value) for value in packed[:3])
    table = packed[_HEADER : _HEADER + _GROUP * num_groups].reshape(num_groups, _GROUP)
    seconds = np.concatenate((packed[3:5], table[:, 5])).view(np.float64).tolist()
    members = packed[_HEADER + _GROUP * num_groups :].tolist()
    batches: list[list[Group]] = []
    start = 0
    for (batch, first, degree, ulysses, count, _), predicted in zip(table.tolist(), seconds[2:], strict=True):
        if batch == len(batches):
            batches.append([])
        batches[-1].append(Group(first, degree, ulysses, tuple(members[start : start + count]), predicted_s=_or_none(predicted)))
        start += count
    return StepPlan(
        world_size,
        tuple(int(length) for length in lengths),
        tuple(MicroBatch(tuple(groups)) for groups in batches),
        predicted_s=_or_none(seconds[0]),
        lower_bound_s=_or_none(seconds[1]),
        bound=BOUNDS[bound],
        source=SOURCES[source],
    )


def _or_nan(seconds: float | None) -> float:
    return math.nan if seconds is None else seconds


def _or_none(seconds: float) -> float | None:
    return None if math.isnan(seconds) else seconds
