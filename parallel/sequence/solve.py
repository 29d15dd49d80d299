"""Plans a step from its lengths: one sequence-parallel degree for all, or groups that suit each sequence. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ...errors import PlanError
from .plan import Group, MicroBatch, StepPlan

if TYPE_CHECKING:
    from .cost import CostModel


def solve_adaptive(lengths: Sequence[int], cost: CostModel, *, budget: int | None = None, wall_s: float | None = None) -> StepPlan:
    """Groups of the degrees that suit the step's sequences, as fast as the search finds; with its lower bound (adaptive.py).

    Never slower in the model than solve_best_static or solve_greedy. The plan depends on lengths, cost and `budget` (units of work;
    None: by the number of sequences) alone, unless `wall_s` cuts the search off. PlanError for a sequence that no group holds.
    """
    from .adaptive import adaptive_plan

    return adaptive_plan(lengths, cost, budget=budget, wall_s=wall_s)


def solve_greedy(lengths: Sequence[int], cost: CostModel) -> StepPlan:
    """Longest first, counting s^2 / ranks only, as Megatron's dynamic context parallelism does: milliseconds, and no search."""
    from .adaptive import greedy_plan

    return greedy_plan(lengths, cost)


def solve_best_static(lengths: Sequence[int], cost: CostModel) -> StepPlan:
    """The best plan of one degree for all sequences, packed best-fit or balanced."""
    from .adaptive import static_plan

    return static_plan(lengths, cost)


def solve_static(
    lengths: Sequence[int], *, world_size: int, degree: int, ulysses: int, tokens_per_rank: int, linear_cost_tokens: float
) -> StepPlan:
    """Pack sequences into groups of `degree` ranks, longest first onto the least loaded, and groups of like load into micro-batches.

    Work of a sequence is s^2 + linear_cost_tokens * s (causal attention, and everything that is linear in tokens).
    A group holds at most degree * tokens_per_rank tokens; members differ by at most two tokens per sequence.
    Deterministic: ties go to the lower index.
    """
    capacity, per_batch = degree * tokens_per_rank, world_size // degree
    longest = max(lengths, default=0)
    if longest > capacity or min(lengths, default=1) < 1:
        raise PlanError(
            "sequence lengths",
            found=f"{longest} tokens" if longest > capacity else "a sequence of no tokens",
            expected=f"1 to {capacity} tokens ({degree} ranks x parallel.tokens_per_rank={tokens_per_rank})",
            hint=f"parallel.tokens_per_rank={-(-longest // degree)} or a larger parallel.sp_degree",
        )
    work = [s * s + linear_cost_tokens * s for s in lengths]
    bins = _pack(lengths, work, capacity, per_batch)
    bins.sort(key=lambda members: (-sum(work[i] for i in members), members))
    groups = [tuple(bins[i : i + per_batch]) for i in range(0, len(bins), per_batch)]
    batches = tuple(
        MicroBatch(tuple(Group(slot * degree, degree, ulysses, tuple(sorted(members))) for slot, members in enumerate(batch)))
        for batch in groups
    )
    return StepPlan(world_size, tuple(int(s) for s in lengths), batches)


def _pack(lengths: Sequence[int], work: Sequence[float], capacity: int, per_batch: int) -> list[list[int]]:
    """Non-empty bins of sequence indices, each within `capacity`; bins are opened a micro-batch at a time."""
    opened = max(1, -(-sum(lengths) // (capacity * per_batch))) * per_batch
    while True:
        bins = _least_loaded(lengths, work, capacity, opened)
        if bins is not None:
            return [members for members in bins if members]
        opened += per_batch


def _least_loaded(lengths: Sequence[int], work: Sequence[float], capacity: int, opened: int) -> list[list[int]] | None:
    bins: list[list[int]] = [[] for _ in range(opened)]
    load, room = [0.0] * opened, [capacity] * opened
    for i in sorted(range(len(lengths)), key=lambda i: (-work[i], i)):
        fits = [b for b in range(opened) if room[b] >= lengths[i]]
        if not fits:
            return None
        best = min(fits, key=lambda b: (load[b], b))
        bins[best].append(i)
        load[best] += work[i]
        room[best] -= lengths[i]
    return bins
