"""Computes one optimizer step's gradients by executing a StepPlan on this rank. Everything here is decided by the plan."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from transformers import PreTrainedModel

from ..model.chunked_loss import IGNORE, Head
from ..model.stage import StagePass, Tokens, stage_of
from ..parallel.pipeline.plan import Action, Kind, Schedule, barrier_free, check_schedule, single_stage
from ..parallel.sequence.attention import BlockKernel
from ..parallel.sequence.clock import BusyClock
from ..parallel.sequence.layout import GroupLayout
from ..parallel.sequence.plan import Group, StepPlan
from ..parallel.sequence.runtime import SequenceAttention, sequence_attention
from ..parallel.topology import Topology
from .data.shard import PackedShard, build_shard, rank_tokens
from .data.source import DataSource
from .non_finite import RowWatch
from .objectives.heads import HeadLoss, StepObjective


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


def count_targets(micro_batches: Sequence[MicroBatchWork], topology: Topology, device: torch.device) -> int:
    """Target tokens of the whole step over all ranks of a stage: the one divisor of its loss. Collective over the stage."""
    local = sum(int(np.count_nonzero(work.shard.target_ids != IGNORE)) for work in micro_batches)
    total = torch.tensor(local, dtype=torch.int64, device=device)
    dist.all_reduce(total, group=topology.stage)
    return int(total)


@dataclass(frozen=True, kw_only=True, slots=True)
class StepSetup:
    """Settings that all steps of a rank have in common."""

    model: PreTrainedModel
    topology: Topology
    kernel: BlockKernel
    device: torch.device
    reduce_each: bool
    """Gradients are reduced after every micro-batch (least memory), else once at the end."""
    barrier_free: bool = False
    """Ranks of different groups do not wait for each other within the step; a rank passes over micro-batches without its groups."""

    def schedule(self, micro_batches: Sequence[MicroBatchWork]) -> Schedule:
        """The schedule of this rank's step of `micro_batches`."""
        if self.barrier_free:
            return barrier_free(index for index, work in enumerate(micro_batches) if work.group is not None)
        return single_stage(len(micro_batches), reduce_each=self.reduce_each)


def backward_step(
    setup: StepSetup,
    micro_batches: Sequence[MicroBatchWork],
    objective: StepObjective,
    *,
    schedule: Schedule | None = None,
    clocks: Sequence[BusyClock] | None = None,
    watch: RowWatch | None = None,
    on_last: Callable[[], None] | None = None,
) -> Tensor:
    """Leave the step's gradients in the parameters; returns this rank's share of the mean loss per micro-batch, float64.

    The sum over micro-batches and ranks is the loss. After an exception nothing is as it was before `abandon_step`.
    `schedule`: another order of the same passes than `setup.schedule`; PlanError where it is none. `clocks`: one per micro-batch,
    to be filled. `watch`: learns which rows' losses are not finite. `on_last` is called before the backward that completes the
    gradients.
    """
    own = schedule or setup.schedule(micro_batches)
    done = {index for index, work in enumerate(micro_batches) if work.group is not None or not setup.barrier_free}
    check_schedule(own, done)
    clocks = clocks or [BusyClock(setup.device) for _ in micro_batches]
    return _StepPasses(setup, micro_batches, objective, clocks, watch, on_last or _nothing).run(own)


class _StepPasses:
    """Executes the actions of one step; the micro-batches in flight wait here for their backward."""

    def __init__(
        self,
        setup: StepSetup,
        micro_batches: Sequence[MicroBatchWork],
        objective: StepObjective,
        clocks: Sequence[BusyClock],
        watch: RowWatch | None,
        on_last: Callable[[], None],
    ) -> None:
        self._setup, self._micro_batches, self._objective, self._clocks = setup, micro_batches, objective, clocks
        self._watch, self._on_last, self._stage = watch, on_last, stage_of(setup.model)
        self._in_flight: dict[int, StagePass] = {}
        self._shares = torch.zeros(len(micro_batches), dtype=torch.float64, device=setup.device)

    def run(self, schedule: Schedule) -> Tensor:
        """Run the actions and return this rank's share of the loss per micro-batch."""
        # What passes before counted (a probe, a norm measured first) is no part of the step.
        self._stage.expert_load.clear()
        self._begin_router_losses()
        for index, action in enumerate(schedule):
            behind = schedule[index + 1 :]
            if action.kind is Kind.GATHER:
                self._stage.weights.keep_whole(keep=True)
            elif action.kind is Kind.REDUCE_EMPTY:
                self._reduce_empty()
            elif action.micro_batch is not None and action.kind is Kind.FORWARD:
                self._forward(action.micro_batch)
            elif action.micro_batch is not None and action.kind is Kind.BACKWARD:
                reduce = bool(behind) and behind[0] == Action(Kind.REDUCE, action.micro_batch)
                self._backward(action.micro_batch, reduce=reduce, last=reduce and len(behind) == 1)
        return self._shares

    def _forward(self, index: int) -> None:
        work, clock = self._micro_batches[index], self._clocks[index]
        flags = None if self._watch is None else self._watch.flags(index, work.shard.num_tokens)
        self._in_flight[index] = self._pass(work, clock, flags)
        self._shares[index] = self._in_flight[index].output.detach()

    def _pass(self, work: MicroBatchWork, clock: BusyClock, flags: Tensor | None = None) -> StagePass:
        head_loss = _head_loss(self._objective, work, self._setup.topology, clock)
        return self._stage.forward(*self._inputs(work, clock, flags), head_loss)

    def _inputs(self, work: MicroBatchWork, clock: BusyClock, flags: Tensor | None = None) -> tuple[Tokens, SequenceAttention]:
        setup = self._setup
        attention = sequence_attention(setup.topology, setup.kernel, work.group, work.layout, clock, work.rank_tokens)
        return to_tokens(work, setup.device, flags), attention

    def _backward(self, index: int, *, reduce: bool, last: bool) -> None:
        if self._stage.router_losses.lacks_shares:
            self._agree_on_routing()
        self._stage.weights.prepare(reduce=reduce, last=last)
        if last:
            self._on_last()
        self._stage.backward(self._in_flight.pop(index))

    def _begin_router_losses(self) -> None:
        """Count the step's tokens, and its routing where several micro-batches are to be balanced together: one more forward of each."""
        losses = self._stage.router_losses
        if not losses.active:
            return
        total = torch.tensor(sum(work.shard.num_tokens for work in self._micro_batches), device=self._setup.device)
        dist.all_reduce(total, group=self._setup.topology.stage)
        losses.begin(int(total))
        if losses.balance > 0 and len(self._micro_batches) > 1:
            with torch.no_grad():
                for work in self._micro_batches:
                    self._stage.weights.forward(*self._inputs(work, BusyClock(self._setup.device)), _no_loss)
            self._agree_on_routing()
            # What the pass counted is of no other use: the step's own passes count anew.
            self._stage.expert_load.clear()
            losses.take()

    def _agree_on_routing(self) -> None:
        """Sum what every rank's tokens chose so far: the step's routing, of its one micro-batch or of all."""
        counts = self._stage.expert_load.peek()
        assert counts is not None, "only models with experts have router losses"
        dist.all_reduce(counts, group=self._setup.topology.stage)
        self._stage.router_losses.use(counts[:, :-1], self._stage.expert_load.layers)

    def _reduce_empty(self) -> None:
        weights = self._stage.weights
        weights.keep_whole(keep=False)
        weights.prepare(reduce=True, last=True)
        empty = self._pass(EMPTY, BusyClock(self._setup.device))
        self._on_last()
        self._stage.backward(empty)


def _nothing() -> None:
    return None


def _no_loss(head: Head) -> Tensor:
    """A pass for its routing alone."""
    return head.x.new_zeros(())


def abandon_step(model: PreTrainedModel) -> None:
    """Clean up after an exception inside `backward_step`: weights are sharded again, host memory free, gradients gone.

    Every rank that raised calls it; none waits for another. An updater's own part of the step is for `Updater.discard`.
    """
    stage = stage_of(model)
    stage.weights.forget()
    stage.forget()
    model.zero_grad()


def _head_loss(objective: StepObjective, work: MicroBatchWork, topology: Topology, clock: BusyClock) -> HeadLoss:
    """The loss of this rank's part of a micro-batch. What it sums, it sums over the ranks of the group."""
    group = work.group
    communicator = None if group is None else topology.group(group.first_rank, group.degree)

    def group_sum(value: Tensor) -> Tensor:
        if communicator is not None:
            with clock.waiting():
                dist.all_reduce(value, group=communicator)
        return value

    return objective.head_loss(work.shard, leads=group is not None and group.first_rank == topology.stage_rank, group_sum=group_sum)


def to_tokens(work: MicroBatchWork, device: torch.device, not_finite: Tensor | None = None) -> Tokens:
    """The shard on the device; a row's document length comes from the group's layout."""
    lengths = np.zeros(0, dtype=np.int64)
    if work.layout is not None:
        lengths = np.repeat(
            [work.layout.lengths[piece.sequence] for piece in work.shard.slices], [len(piece) for piece in work.shard.slices]
        )
    arrays = work.shard.token_ids, work.shard.target_ids, work.shard.position_ids, lengths.astype(np.int64)
    token_ids, target_ids, position_ids, document_lengths = (torch.from_numpy(array).to(device) for array in arrays)
    return Tokens(token_ids, target_ids, position_ids, document_lengths, not_finite)
