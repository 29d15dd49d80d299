"""Executes the passes of one step on one rank: the schedule of one stage, or the actions of one pipeline rank."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from ..memory.executor.weight_products import WeightProducts
from ..model.chunked_loss import Head
from ..model.stage import StagePass, stage_of
from ..parallel.pipeline.links import StageLinks
from ..parallel.pipeline.pipeline_plan import ActionKind, PipelineAction, Unit, UnitKind
from ..parallel.pipeline.plan import Action, Kind, Schedule
from ..parallel.sequence.clock import BusyClock
from ..parallel.sharding.parts import local
from ..parallel.topology import Topology
from .forward_only import forward_only
from .micro_batches import EMPTY, MicroBatchWork, to_tokens
from .non_finite import RowWatch
from .objectives.heads import HeadLoss, StepObjective
from .step_setup import StepSetup


class StepPasses:
    """Executes one step; the micro-batches in flight wait here for their backward."""

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
        self._shares = torch.zeros(len(micro_batches), dtype=torch.float64, device=setup.device)

    def run(self, schedule: Schedule) -> Tensor:
        """Run the actions of the one stage there is, and return this rank's share of the loss per micro-batch."""
        in_flight: dict[int, StagePass] = {}
        self._begin()
        for index, action in enumerate(schedule):
            behind = schedule[index + 1 :]
            if action.kind is Kind.GATHER:
                self._stage.weights.keep_whole(keep=True)
            elif action.kind is Kind.REDUCE_EMPTY:
                self._reduce_empty()
            elif action.micro_batch is not None and action.kind is Kind.FORWARD:
                in_flight[action.micro_batch] = self.forward_pass(action.micro_batch)
            elif action.micro_batch is not None and action.kind is Kind.BACKWARD:
                reduce = bool(behind) and behind[0] == Action(Kind.REDUCE, action.micro_batch)
                self.backward_pass(in_flight.pop(action.micro_batch), reduce=reduce, last=reduce and len(behind) == 1)
        return self._shares

    def run_stages(self, actions: Sequence[PipelineAction], links: StageLinks) -> Tensor:
        """Run the actions of one pipeline rank, and return its share of the loss per micro-batch: of the last stage alone."""
        self._begin()
        _PipelineRank(self, actions, links).run()
        links.finish()
        self._sum_tied(links)
        return self._shares

    @property
    def reduce_each(self) -> bool:
        """Whether gradients are reduced after every micro-batch."""
        return self._setup.reduce_each

    def rows(self, index: int) -> int:
        """Tokens of this rank in a micro-batch."""
        return self._micro_batches[index].shard.num_tokens

    def _begin(self) -> None:
        # What passes before counted (a probe, a norm measured first) is no part of the step.
        self._stage.expert_load.clear()
        self._begin_router_losses()

    def forward_pass(self, index: int, received: Tensor | None = None, part: int = 0, *, weights_apart: bool = False) -> StagePass:
        """Run a virtual stage on a micro-batch; the last one's loss is noted. `weights_apart`: a `weight_pass` follows its backward."""
        work, is_last = self._micro_batches[index], self._stage.parts[part].last
        flags = self._watch.flags(index, work.shard.num_tokens) if self._watch is not None and is_last else None
        done = self._pass(work, self._clocks[index], flags, received, part, weights_apart=weights_apart)
        if is_last:
            self._shares[index] = done.output.detach()
        return done

    def _pass(
        self,
        work: MicroBatchWork,
        clock: BusyClock,
        flags: Tensor | None = None,
        received: Tensor | None = None,
        part: int = 0,
        *,
        weights_apart: bool = False,
    ) -> StagePass:
        head_loss = _head_loss(self._objective, work, self._setup.topology, clock) if self._stage.parts[part].last else None
        tokens = to_tokens(work, self._setup.device, flags)
        return self._stage.forward(tokens, self._setup.attention(work, clock), head_loss, received, part, weights_apart=weights_apart)

    def backward_pass(self, done: StagePass, gradient: Tensor | None = None, *, reduce: bool, last: bool) -> Tensor | None:
        """Add a micro-batch's gradients, and `reduce` what has piled up; returns the gradient of what was received."""
        if self._stage.router_losses.lacks_shares:
            self._agree_on_routing()
        self._stage.weights.prepare(reduce=reduce, last=last)
        if last:
            self._on_last()
        return self._stage.backward(done, gradient)

    def weight_pass(self, products: WeightProducts, part: int, *, reduce: bool, last: bool) -> None:
        """Add the gradients of weights that a micro-batch's backward left, and `reduce` what has piled up."""
        self._stage.weights.prepare(reduce=reduce, last=last)
        if last:
            self._on_last()
        self._stage.weight_gradients(products, part)

    def _sum_tied(self, links: StageLinks) -> None:
        """Add up the gradients of a matrix that is the embedding on the first stage and the head on the last."""
        ends = links.place.ranks.ends
        if ends is None or not self._stage.is_tied:
            return
        matrix: Tensor = self._setup.model.model.embed_tokens.weight
        if matrix.grad is not None:
            dist.all_reduce(local(matrix.grad), group=ends)

    def _begin_router_losses(self) -> None:
        """Count the step's tokens, and its routing where several micro-batches are to be balanced together: one more forward of each."""
        losses = self._stage.router_losses
        if not losses.active:
            return
        total = torch.tensor(sum(work.shard.num_tokens for work in self._micro_batches), device=self._setup.device)
        dist.all_reduce(total, group=self._setup.topology.stage)
        losses.begin(int(total))
        if losses.balance > 0 and len(self._micro_batches) > 1:
            forward_only(self._setup, self._micro_batches, lambda work: _no_loss)
            self._agree_on_routing()
            # What the pass counted is of no other use: the step's own passes count anew.
            self._stage.expert_load.clear()
            losses.take()

    def _agree_on_routing(self) -> None:
        """Sum what every rank's tokens chose so far: the step's routing, of its one micro-batch or of all."""
        load, losses = self._stage.expert_load, self._stage.router_losses
        counts = load.peek()
        if counts is None:  # a stage whose layers have no experts
            losses.use(torch.zeros(0, 1), ())
            return
        dist.all_reduce(counts, group=self._setup.topology.stage)
        losses.use(counts[:, :-1], load.layers)

    def _reduce_empty(self) -> None:
        weights = self._stage.weights
        weights.keep_whole(keep=False)
        weights.prepare(reduce=True, last=True)
        empty = self._pass(EMPTY, BusyClock(self._setup.device))
        self._on_last()
        self._stage.backward(empty)


class _PipelineRank:
    """Executes the actions of one pipeline rank: its virtual stages' passes, with what they receive and send."""

    def __init__(self, passes: StepPasses, actions: Sequence[PipelineAction], links: StageLinks) -> None:
        self._passes, self._actions, self._links, self._place = passes, actions, links, links.place
        self._in_flight: dict[Unit, StagePass] = {}
        self._made: dict[Unit, Tensor] = {}
        """What waits to be sent."""
        computed = [action.unit for action in actions if action.kind is ActionKind.COMPUTE]
        self._apart = {unit.with_kind(UnitKind.BACKWARD) for unit in computed if unit.kind is UnitKind.WEIGHT}
        """Backward passes that leave gradients of weights to a pass of their own."""
        self._left: dict[Unit, WeightProducts] = {}
        """What they left."""
        ends = [unit for unit in computed if unit.kind is not UnitKind.FORWARD and unit not in self._apart]
        self._last = ends[-1] if ends else None
        self._last_of_stage = set({unit.stage: unit for unit in ends}.values())
        """The last pass of each virtual stage that adds gradients: they are complete then."""

    def run(self) -> None:
        """Run them all."""
        for action in self._actions:
            unit = action.unit
            if action.peer is not None and action.kind is ActionKind.RECEIVE:
                self._links.post(unit, action.peer, self._passes.rows(unit.micro_batch))
            elif action.peer is not None:
                self._links.send(unit, action.peer, self._made.pop(unit))
            elif unit.kind is UnitKind.FORWARD:
                self._forward(unit)
            elif unit.kind is UnitKind.BACKWARD:
                self._backward(unit)
            else:
                self._weights(unit)

    def _forward(self, unit: Unit) -> None:
        part = self._place.part_of(unit.stage)
        own = self._place.parts[part]
        sender, rows = Unit(unit.kind, unit.stage - 1, unit.micro_batch), self._passes.rows(unit.micro_batch)
        before = None if own.first else self._links.take(sender, rows)
        apart = unit.with_kind(UnitKind.BACKWARD) in self._apart
        done = self._in_flight[unit] = self._passes.forward_pass(unit.micro_batch, before, part, weights_apart=apart)
        if not own.last:
            self._made[unit] = done.output.detach()

    def _backward(self, unit: Unit) -> None:
        own, forward = self._place.parts[self._place.part_of(unit.stage)], unit.with_kind(UnitKind.FORWARD)
        gradient = None
        if not own.last:
            gradient = self._links.take(Unit(unit.kind, unit.stage + 1, unit.micro_batch), self._passes.rows(unit.micro_batch))
            self._links.release(forward)
        done = self._in_flight.pop(forward)
        if unit in self._apart:
            assert done.products is not None, "its forward pass was told so"
            self._left[unit] = done.products
        back = self._passes.backward_pass(done, gradient, reduce=self._reduces(unit), last=unit == self._last)
        if back is not None:
            self._made[unit] = back

    def _weights(self, unit: Unit) -> None:
        products = self._left.pop(unit.with_kind(UnitKind.BACKWARD))
        self._passes.weight_pass(products, self._place.part_of(unit.stage), reduce=self._reduces(unit), last=unit == self._last)

    def _reduces(self, unit: Unit) -> bool:
        return self._passes.reduce_each or unit in self._last_of_stage


def _no_loss(head: Head) -> Tensor:
    """A pass for its routing alone."""
    return head.x.new_zeros(())


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
