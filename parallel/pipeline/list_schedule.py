"""A pipeline order made for its costs: each rank takes what is most urgent of what has come, within its memory. Pure.

Published orders are made for units that take equally long. Here a rank that would wait for a late micro-batch does something else.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import numpy as np

from ...errors import PlanError
from .generators import B, F, W
from .pipeline_plan import PipelineSchedule, Unit, UnitKind
from .simulate import PipelineCosts


def list_schedule(stage_ranks: Sequence[int], costs: PipelineCosts, cap_bytes: Sequence[float], *, split: bool) -> PipelineSchedule:
    """Backward before forward, later stages before earlier ones, and with `split` gradients of weights where nothing else can run.

    A rank lets a micro-batch's slice into its first stage only where it has room for the slice in all its stages: what was let in can then
    always go on. PlanError where a rank has no room for one micro-batch.
    """
    work = _Work(stage_ranks, costs, cap_bytes, split)
    choices = [work.choice(rank) for rank in range(work.ranks)]
    while work.left:
        starts = [(choice[0], rank) for rank, choice in enumerate(choices) if choice is not None]
        if not starts:
            raise PlanError(
                "pipeline schedule",
                found=f"no room for a micro-batch in {[f'{cap:.4g}' for cap in cap_bytes]} bytes",
                expected="room for one on every rank",
                hint="smaller micro-batches, more slices or recomputation",
            )
        _, rank = min(starts)
        chosen = choices[rank]
        assert chosen is not None
        # Nothing else changes for the other ranks.
        for changed in work.run(rank, *chosen):
            choices[changed] = work.choice(changed)
    _, batches, slices = costs.shape
    return PipelineSchedule(
        num_stages=len(stage_ranks),
        num_ranks=work.ranks,
        stage_ranks=tuple(stage_ranks),
        num_micro_batches=batches,
        slices=slices,
        orders=tuple(map(tuple, work.orders)),
    )


class _Work:
    """What each rank has done, what has come to it and when, and what it holds."""

    def __init__(self, stage_ranks: Sequence[int], costs: PipelineCosts, cap_bytes: Sequence[float], split: bool) -> None:
        self.stage_ranks, self.split, self.cap_bytes = stage_ranks, split, cap_bytes
        self.stages, self.batches, self.slices = costs.shape
        self.ranks = max(stage_ranks) + 1
        self.own = [[stage for stage in range(self.stages) if stage_ranks[stage] == rank] for rank in range(self.ranks)]
        self.left = self.stages * self.batches * self.slices * (2 + split)
        self.free_s = [0.0] * self.ranks
        self.held = [float(sum(costs.fixed_bytes[stage] for stage in own)) for own in self.own]
        self.orders: list[list[Unit]] = [[] for _ in range(self.ranks)]
        back = [(m, j) for m in range(self.batches) for j in reversed(range(self.slices))]
        # Micro-batches and slices in the order in which each stage takes them.
        self.forward = [deque(np.ndindex(self.batches, self.slices)) for _ in range(self.stages)]
        self.backward = [deque(back) for _ in range(self.stages)]
        self.deferred: list[deque[Unit]] = [deque() for _ in range(self.ranks)]
        # When what a pass needs of other stages is there, by stage, micro-batch and slice.
        self.output_come: dict[tuple[int, int, int], float] = {(0, m, j): 0.0 for m, j in self.forward[0]}
        self.gradient_come: dict[tuple[int, int, int], float] = {}
        own_rows = [np.array(own) for own in self.own]
        # What a slice of a micro-batch will hold in all stages of a rank, and what it needs to be let in.
        held = [costs.held_bytes[rows].sum(axis=0) for rows in own_rows]
        self.let_in = [values.tolist() for values in held]
        self.room = [(values + costs.work_bytes[rows].max(axis=0)).tolist() for values, rows in zip(held, own_rows, strict=True)]
        self.message_s = (costs.alpha_s + costs.s_per_byte * costs.output_bytes).tolist()
        whole = costs.backward_s if split else costs.backward_s + costs.weight_s
        self.seconds = {F: costs.forward_s.tolist(), B: whole.tolist(), W: costs.weight_s.tolist()}
        self.waits, self.later = costs.held_bytes.tolist(), costs.weight_bytes.tolist()

    def choice(self, rank: int) -> tuple[float, Unit] | None:
        """What a rank would do next, and when: the first that can start, the most urgent of those that start together."""
        free, first = self.free_s[rank], self.own[rank][0]
        best: tuple[float, int, UnitKind, int] | None = None
        for stage in reversed(self.own[rank]):
            for urgency, kind, queue, come in ((0, B, self.backward, self.gradient_come), (1, F, self.forward, self.output_come)):
                at = come.get((stage, *queue[stage][0])) if queue[stage] else None
                if at is None or (kind is F and stage == first and not self.has_room(rank, *queue[stage][0])):
                    continue
                if best is None or (max(free, at), urgency) < best[:2]:
                    best = max(free, at), urgency, kind, stage
        if self.deferred[rank] and (best is None or best[0] > free):
            return free, self.deferred[rank][0]
        if best is None:
            return None
        start, _, kind, stage = best
        return start, Unit(kind, stage, *(self.backward if kind is B else self.forward)[stage][0])

    def has_room(self, rank: int, micro_batch: int, piece: int) -> bool:
        return bool(self.held[rank] + self.room[rank][micro_batch][piece] <= self.cap_bytes[rank])

    def run(self, rank: int, start_s: float, unit: Unit) -> set[int]:
        """Do it; the ranks for which something has come."""
        stage, m, j = unit.stage, unit.micro_batch, unit.slice
        end = self.free_s[rank] = start_s + self.seconds[unit.kind][stage][m][j]
        self.left -= 1
        self.orders[rank].append(unit)
        if unit.kind is W:
            self.deferred[rank].popleft()
            self.held[rank] -= self.later[stage][m][j]
            return {rank}
        if unit.kind is F:
            self.forward[stage].popleft()
            self.held[rank] += self.let_in[rank][m][j] if stage == self.own[rank][0] else 0.0
            if stage + 1 == self.stages:
                # Backward begins with the last slice, and needs the outputs of all.
                self.gradient_come |= {(stage, m, piece): end for piece in range(self.slices)} if j + 1 == self.slices else {}
                return {rank}
            return {rank, self.arrive(self.output_come, stage + 1, end, unit)}
        self.backward[stage].popleft()
        self.held[rank] -= self.waits[stage][m][j]
        if self.split:
            self.held[rank] += self.later[stage][m][j]
            self.deferred[rank].append(unit.with_kind(W))
        return {rank, self.arrive(self.gradient_come, stage - 1, end, unit)} if stage else {rank}

    def arrive(self, come: dict[tuple[int, int, int], float], stage: int, end_s: float, maker: Unit) -> int:
        """What `maker` made comes to the rank of another stage."""
        rank, m, j = self.stage_ranks[stage], maker.micro_batch, maker.slice
        apart = rank != self.stage_ranks[maker.stage]
        come[stage, m, j] = end_s + (self.message_s[maker.stage][m][j] if apart else 0.0)
        return rank
