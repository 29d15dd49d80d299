"""Pipeline schedules with several virtual stages a rank: interleaved 1F1B, ZBV and DualPipeV. Pure.

In a V a rank has stage r and stage 2 R - 1 - r of 2 R: the loss is on rank 0, where the embedding is.
"""

from __future__ import annotations

from collections import deque

from ...errors import PlanError
from .generators import B, F, W, alternate, make, one_f_one_b, sliced_1f1b
from .pipeline_plan import PipelineSchedule, Unit, UnitKind


def interleaved(ranks: int, micro_batches: int, virtual_stages: int, slices: int = 1) -> PipelineSchedule:
    """1F1B with `virtual_stages` on every rank, stage s on rank s mod R: the bubble is so many times smaller (arXiv 2104.04473).

    Micro-batches go through a rank's stages in groups of R. Slices are scheduled as micro-batches are, with backward in reverse order, in
    groups of R or a few more, so that no group cuts a micro-batch: Seq1F1B's interleaved variant.
    """
    if virtual_stages < 1:
        raise PlanError("pipeline schedule", found=f"{virtual_stages} virtual stages", expected="1 or more", hint="2 a rank")
    if virtual_stages == 1:
        return one_f_one_b(ranks, micro_batches) if slices == 1 else sliced_1f1b(ranks, micro_batches, slices)
    group = -(-ranks // slices)
    # Whole groups, which the published order is made of.
    groups = -(-micro_batches // group)
    orders = []
    for rank in range(ranks):
        forward: list[Unit] = []
        backward: list[Unit] = []
        for first in range(0, groups * group, group):
            pieces = [(m, j) for m in range(first, first + group) for j in range(slices)]
            for chunk in range(virtual_stages):
                forward += [Unit(F, chunk * ranks + rank, m, j) for m, j in pieces]
                backward += [Unit(B, (virtual_stages - 1 - chunk) * ranks + rank, m, slices - 1 - j) for m, j in pieces]
        warm_up = 2 * (ranks - 1 - rank) + (virtual_stages - 1) * group * slices + slices - 1
        orders.append(alternate(forward, backward, warm_up))
    return make(ranks, [stage % ranks for stage in range(ranks * virtual_stages)], micro_batches, orders, slices)


class _Rank:
    """One rank of a V: counts of what it did, and the order of it."""

    def __init__(self, rank: int, ranks: int) -> None:
        self.stages = (rank, 2 * ranks - 1 - rank)
        self.order: list[Unit] = []
        self.next: dict[tuple[UnitKind, int], int] = {}
        self.deferred: deque[Unit] = deque()

    def add(self, kind: UnitKind, half: int) -> Unit:
        """The next micro-batch's pass through the rank's first (0) or second (1) stage."""
        number = self.next.get((kind, half), 0)
        self.next[kind, half] = number + 1
        self.order.append(Unit(kind, self.stages[half], number))
        return self.order[-1]

    def forward(self, *halves: int) -> None:
        for half in halves:
            self.add(F, half)

    def backward(self, half: int, *, split: bool, now: bool = False) -> None:
        """A backward pass; `split`: its gradients of weights come later, or right behind it with `now`."""
        unit = self.add(B, half)
        if split:
            self.deferred.append(unit.with_kind(W))
        if now:
            self.weights()

    def weights(self) -> None:
        self.order.append(self.deferred.popleft())


def _v(ranks: int) -> list[int]:
    return [min(stage, 2 * ranks - 1 - stage) for stage in range(2 * ranks)]


def zbv(ranks: int, micro_batches: int) -> PipelineSchedule:
    """Two stages a rank in a V, gradients of weights apart: no bubble between equal F, B and W (ZB-V, arXiv 2401.10241).

    A rank holds 2 R stages' worth of micro-batches at most: as much as rank 0 under 1F1B, whose stages are twice as large.
    """
    batches = max(micro_batches, 2 * ranks - 1)
    orders = []
    for rank in range(ranks):
        row = _Rank(rank, ranks)
        row.forward(*[0] * (2 * (ranks - rank) - 1), *[1, 0] * rank)
        for _ in range(ranks - rank):
            row.forward(1)
            row.backward(1, split=True, now=True)
        for turn in range(batches - ranks):
            # The first stage has its last forward pass before the second one has.
            row.forward(*[0] * (2 * ranks - 1 - rank + turn < batches))
            row.backward(0, split=True, now=True)
            row.forward(1)
            row.backward(1, split=True, now=True)
        for _ in range(rank):
            row.backward(0, split=True)
            row.backward(1, split=True)
        for _ in range(ranks - rank):
            row.backward(0, split=True)
            row.weights()
        orders.append([*row.order, *row.deferred])
    return make(ranks, _v(ranks), micro_batches, orders)


def dual_pipe_v(ranks: int, micro_batches: int) -> PipelineSchedule:
    """Two stages a rank in a V, forward passes of one beside backward passes of the other (DualPipeV, of DeepSeek's DualPipe).

    Gradients of weights are apart only where the pipeline fills and drains. A pair of passes that would overlap on a machine with
    experts is one after the other here.
    """
    batches = max(micro_batches, 2 * ranks)
    orders = []
    for rank in range(ranks):
        row, ahead = _Rank(rank, ranks), ranks - 1 - rank
        row.forward(*[0] * (2 * ahead), *[0, 1] * (rank + 1))
        for _ in range(ahead):
            row.backward(1, split=True, now=True)
            row.forward(1)
        for _ in range(batches - 2 * ranks + rank + 1):
            row.forward(0)
            row.backward(1, split=False)
            row.forward(1)
            row.backward(0, split=False)
        for _ in range(ahead):
            row.backward(1, split=False)
            row.forward(1)
            row.backward(0, split=False)
        for number in range(2 * (rank + 1)):
            row.backward(1 - number % 2, split=number > rank)
        for _ in range(ahead):
            row.weights()
            row.backward(0, split=True)
        orders.append([*row.order, *row.deferred])
    return make(ranks, _v(ranks), micro_batches, orders)
