"""One optimizer step's gradients: execute a StepPlan on this rank. Everything here is decided by the plan."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from transformers import PreTrainedModel

from ..model.build import Tokens, trunk_of
from ..model.chunked_loss import IGNORE
from ..parallel.sequence.attention import BlockKernel
from ..parallel.sequence.clock import BusyClock
from ..parallel.sequence.layout import GroupLayout
from ..parallel.sequence.plan import Group, StepPlan
from ..parallel.sequence.runtime import SequenceAttention, sequence_attention
from ..parallel.sharding import forget_pass, gather_weights, keep_weights, prepare_backward
from ..parallel.topology import Topology
from .data.shard import PackedShard, build_shard
from .data.source import DataSource
from .non_finite import RowWatch
from .objectives.heads import HeadLoss, LanguageModelling, StepObjective


@dataclass(frozen=True, slots=True)
class MicroBatchWork:
    """What this rank does in one micro-batch; without a group it runs with zero rows so that collectives match."""

    shard: PackedShard
    layout: GroupLayout | None
    group: Group | None


_NONE = np.zeros(0, dtype=np.int64)
EMPTY = MicroBatchWork(PackedShard(_NONE, _NONE, _NONE, ()), None, None)
"""No tokens: every collective over all ranks, and nothing else."""


def read_step(source: DataSource, step: int, plan: StepPlan, rank: int) -> list[MicroBatchWork]:
    """This rank's work of each micro-batch; reads only the tokens it holds."""
    return [
        MicroBatchWork(*build_shard(source, step, plan, index, rank), batch.group_of(rank))
        for index, batch in enumerate(plan.micro_batches)
    ]


def step_shape(works: Sequence[MicroBatchWork]) -> Hashable:
    """Equal for steps whose tensors have the same sizes in the same order on this rank: what an arena's plan is made for.

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
        for work in works
    )


def count_targets(works: Sequence[MicroBatchWork], device: torch.device) -> int:
    """Target tokens of the whole step over all ranks: the one divisor of its loss. Collective."""
    local = sum(int(np.count_nonzero(work.shard.target_ids != IGNORE)) for work in works)
    total = torch.tensor(local, dtype=torch.int64, device=device)
    dist.all_reduce(total)
    return int(total)


def backward_step(
    model: PreTrainedModel,
    topology: Topology,
    kernel: BlockKernel,
    works: Sequence[MicroBatchWork],
    *,
    num_targets: int,
    reduce_each: bool,
    device: torch.device,
    barrier_free: bool = False,
    clocks: Sequence[BusyClock] | None = None,
    watch: RowWatch | None = None,
    objective: StepObjective | None = None,
    on_last: Callable[[], None] | None = None,
) -> Tensor:
    """Leave the step's gradients in the parameters; returns this rank's share of the mean loss per micro-batch, float64.

    The sum over micro-batches and ranks is the loss. `objective`: of this step; None: language modelling over `num_targets`.

    `reduce_each`: reduce gradients after every micro-batch (least memory), else once at the end. `barrier_free`: ranks of
    different groups do not wait for each other within the step (Note below). `clocks`: one per micro-batch, to be filled.
    After an exception nothing is as it was before `abandon_step`.
    `watch`: learns which rows' losses are not finite. `on_last` is called before the backward that completes the gradients.

    Note: without barriers, all weights are gathered first and stay; a rank passes over micro-batches in which it has no group.
    Reductions cannot ride on a rank's last micro-batch: its partners may have more to do first, and need it. They ride on one
    more pass, of no tokens, that all ranks make at the end.
    """
    clocks = clocks or [BusyClock(device) for _ in works]
    objective = objective or LanguageModelling(num_targets, device)
    shares = torch.zeros(len(works), dtype=torch.float64, device=device)
    if barrier_free:
        keep_weights(model, keep=True)
        gather_weights(model)
    for index, work in enumerate(works):
        if barrier_free and work.group is None:
            continue
        last = index == len(works) - 1 and not barrier_free
        prepare_backward(model, reduce=last or reduce_each, last=last)
        attention = sequence_attention(topology, kernel, work.group, work.layout, clocks[index])
        tokens = to_tokens(work, device, None if watch is None else watch.flags(index, work.shard.num_tokens))
        share = _head_loss(objective, work, topology, clocks[index])
        shares[index] = _micro_batch(model, attention, tokens, share, on_last if last else None)
    if barrier_free:
        keep_weights(model, keep=False)
        prepare_backward(model, reduce=True, last=True)
        clock = BusyClock(device)
        nothing = sequence_attention(topology, kernel, None, None, clock)
        _micro_batch(model, nothing, to_tokens(EMPTY, device), _head_loss(objective, EMPTY, topology, clock), on_last)
    return shares


def abandon_step(model: PreTrainedModel) -> None:
    """After an exception inside `backward_step`: weights are sharded again, host memory is free, gradients are gone.

    Every rank that raised calls it; none waits for another. An updater's own part of the step is for `Updater.discard`.
    """
    forget_pass(model)
    trunk_of(model).forget()
    model.zero_grad()


def _micro_batch(
    model: PreTrainedModel,
    attention: SequenceAttention,
    tokens: Tokens,
    head_loss: HeadLoss,
    before_backward: Callable[[], None] | None = None,
) -> Tensor:
    loss: Tensor = model(tokens, attention, head_loss)
    if before_backward is not None:
        before_backward()
    loss.backward()
    return loss.detach()


def _head_loss(objective: StepObjective, work: MicroBatchWork, topology: Topology, clock: BusyClock) -> HeadLoss:
    """The objective of this rank's part of a micro-batch. What it sums, it sums over the ranks of the group."""
    group = work.group
    communicator = None if group is None else topology.group(group.first_rank, group.degree)

    def group_sum(value: Tensor) -> Tensor:
        if communicator is not None:
            with clock.waiting():
                dist.all_reduce(value, group=communicator)
        return value

    return objective.head_loss(work.shard, leads=group is not None and group.first_rank == topology.rank, group_sum=group_sum)


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
