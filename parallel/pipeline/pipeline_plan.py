"""Pipeline schedules as data: which rank computes which unit when, what travels between ranks, and whether it can hang. Pure.

A unit is one pass of one virtual stage over one micro-batch, or over one slice of it. It is printed as `2F3` (stage 2, forward,
micro-batch 3), `2F3.1` is slice 1 of it. A schedule has one fixed order of units for each pipeline rank; sends and receives follow from it.

Note: messages from one rank to another are matched first in, first out, activations and gradients each by themselves. Receives are
therefore posted in the order of the sends, also where a rank needs them in another order.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from enum import Enum
from functools import cached_property
from typing import NoReturn

from ...errors import PlanError

RECEIVE_DEPTH = 1
"""Receives are posted so many units before the one that needs them. With 1 also sends that wait for their receive cannot hang 1F1B."""
_HINT = "a schedule of parallel/pipeline/generators.py"


class UnitKind(Enum):
    """What a unit computes; values are the letters it is printed with."""

    FORWARD = "F"
    BACKWARD = "B"
    """Gradients of inputs; those of weights too, unless there is a `WEIGHT` of the same stage, micro-batch and slice."""
    WEIGHT = "W"
    """Gradients of weights, any time after its `BACKWARD`."""


@dataclass(frozen=True, slots=True)
class Unit:
    """One pass of one virtual stage over one slice of one micro-batch."""

    kind: UnitKind
    stage: int
    micro_batch: int
    slice: int = 0

    def __str__(self) -> str:
        return f"{self.stage}{self.kind.value}{self.micro_batch}" + (f".{self.slice}" if self.slice else "")

    def with_kind(self, kind: UnitKind) -> Unit:
        """Another pass of the same stage over the same rows."""
        return Unit(kind, self.stage, self.micro_batch, self.slice)


@dataclass(frozen=True, kw_only=True)
class PipelineSchedule:
    """The order of units on every pipeline rank. Nothing is checked here: `check` does."""

    num_stages: int
    """Virtual stages in all."""
    num_ranks: int
    """Pipeline ranks."""
    stage_ranks: tuple[int, ...]
    """Pipeline rank of each virtual stage."""
    num_micro_batches: int
    slices: int = 1
    """Slices of each micro-batch; forward in their order, backward in the reverse one."""
    orders: tuple[tuple[Unit, ...], ...]
    """By pipeline rank."""

    @cached_property
    def split(self) -> frozenset[Unit]:
        """The backward units whose gradients of weights are made by a unit of their own."""
        return frozenset(unit.with_kind(UnitKind.BACKWARD) for order in self.orders for unit in order if unit.kind is UnitKind.WEIGHT)

    def needs(self, unit: Unit) -> tuple[Unit, ...]:
        """Units that end before this one starts: of the stage itself first, the neighbour's last."""
        stage, batch, piece = unit.stage, unit.micro_batch, unit.slice
        if unit.kind is UnitKind.WEIGHT:
            return (unit.with_kind(UnitKind.BACKWARD),)
        if unit.kind is UnitKind.FORWARD:
            # Keys and values of earlier slices.
            own = (Unit(unit.kind, stage, batch, piece - 1),) if piece else ()
            return own + ((Unit(unit.kind, stage - 1, batch, piece),) if stage else ())
        # Gradients of keys and values come from later slices.
        later = (Unit(unit.kind, stage, batch, piece + 1),) if piece + 1 < self.slices else ()
        behind = (Unit(unit.kind, stage + 1, batch, piece),) if stage + 1 < self.num_stages else ()
        return (unit.with_kind(UnitKind.FORWARD), *later, *behind)

    def receiver(self, unit: Unit) -> int | None:
        """The other rank that a unit's output or gradient goes to; None: to none."""
        if unit.kind is UnitKind.WEIGHT:
            return None
        stage = unit.stage + (1 if unit.kind is UnitKind.FORWARD else -1)
        if not 0 <= stage < self.num_stages or self.stage_ranks[stage] == self.stage_ranks[unit.stage]:
            return None
        return self.stage_ranks[stage]

    def stages_of(self, rank: int) -> tuple[int, ...]:
        """Virtual stages of a pipeline rank."""
        return tuple(stage for stage, owner in enumerate(self.stage_ranks) if owner == rank)


class ActionKind(Enum):
    """What a rank does next."""

    COMPUTE = ""
    """Compute the unit, once what it needs has come."""
    SEND = ">"
    """Start to send what the unit made."""
    RECEIVE = "<"
    """Post the receive of what the unit makes on another rank; whatever needs it waits."""


@dataclass(frozen=True, slots=True)
class PipelineAction:
    """One action of one rank. Both ends of a message name the unit that makes it: forward an activation, backward a gradient."""

    kind: ActionKind
    unit: Unit
    peer: int | None = None
    """Pipeline rank at the other end of a message."""

    def __str__(self) -> str:
        return f"{self.unit}{self.kind.value}{'' if self.peer is None else self.peer}"


Actions = tuple[tuple[PipelineAction, ...], ...]


def with_transfers(schedule: PipelineSchedule, depth: int = RECEIVE_DEPTH) -> Actions:
    """Every rank's units with sends and receives: `0F0 0F0>1` sends to rank 1, which does `0F0<0 1F0`.

    A send comes right after the unit that makes it. A receive is posted `depth` units before the unit that needs it, or earlier, where
    the peer sends something first that is needed later. PlanError where a unit is missing, twice or on another rank.
    """
    if depth < 0:
        raise PlanError("pipeline schedule", found=f"receives posted {depth} units ahead", expected="0 or more", hint="depth=1")
    _check_units(schedule)
    receives = _receives(schedule, depth)
    actions = []
    for rank, order in enumerate(schedule.orders):
        row: list[PipelineAction] = []
        for position, unit in enumerate(order):
            row += receives[rank].get(position, [])
            row.append(PipelineAction(ActionKind.COMPUTE, unit))
            peer = schedule.receiver(unit)
            if peer is not None:
                row.append(PipelineAction(ActionKind.SEND, unit, peer))
        actions.append(tuple(row))
    return tuple(actions)


def _receives(schedule: PipelineSchedule, depth: int) -> list[dict[int, list[PipelineAction]]]:
    """By rank: what is posted before the unit at each position, in the order of the sends of each peer and direction."""
    needed_at: dict[Unit, int] = {}
    for order in schedule.orders:
        for position, unit in enumerate(order):
            for need in schedule.needs(unit):
                if schedule.stage_ranks[need.stage] != schedule.stage_ranks[unit.stage]:
                    needed_at[need] = position
    posted: list[dict[int, list[PipelineAction]]] = [defaultdict(list) for _ in schedule.orders]
    for sender, order in enumerate(schedule.orders):
        # From the last message to the first: none is posted after one that is sent later.
        latest: dict[tuple[int, UnitKind], int] = {}
        for unit in reversed(order):
            receiver = schedule.receiver(unit)
            if receiver is not None:
                channel = receiver, unit.kind
                latest[channel] = min(latest.get(channel, len(schedule.orders[receiver])), max(0, needed_at[unit] - depth))
                posted[receiver][latest[channel]].insert(0, PipelineAction(ActionKind.RECEIVE, unit, sender))
    return posted


def check(schedule: PipelineSchedule, *, depth: int = RECEIVE_DEPTH, rendezvous: bool = False) -> None:
    """PlanError unless every unit occurs once, on the rank of its stage, and the ranks' orders with their messages run to the end.

    The proof runs them: sends do not block; with `rendezvous` each waits until its receive is posted, as sends without a buffer do.
    """
    check_actions(schedule, with_transfers(schedule, depth), rendezvous=rendezvous)


def check_actions(schedule: PipelineSchedule, actions: Actions, *, rendezvous: bool = False) -> None:
    """The second half of `check`, for actions that were placed in another way. PlanError names what would hang, and why."""
    execution = _Execution(schedule, actions, rendezvous)
    moved = True
    while moved:
        moved = sum(map(execution.advance, range(schedule.num_ranks))) > 0
    if blocked := [rank for rank, row in enumerate(actions) if execution.at[rank] < len(row)]:
        _refuse("; ".join(execution.waits(rank) for rank in blocked[:4]))
    for channel in execution.sent.keys() | execution.posted.keys():
        sent, posted = execution.sent[channel], list(execution.posted[channel])
        if sent != posted:
            sender, receiver, _ = channel
            _refuse(f"rank {sender} sends {' '.join(map(str, sent))}, and rank {receiver} receives {' '.join(map(str, posted))}")


def least_depth(schedule: PipelineSchedule) -> int:
    """The smallest depth of receives with which not even sends that wait for their receive hang; PlanError as `check`."""
    check(schedule)
    for depth in range(max(map(len, schedule.orders))):
        try:
            check(schedule, depth=depth, rendezvous=True)
        except PlanError:
            continue
        return depth
    # All receives are posted before anything else: no send waits.
    return max(map(len, schedule.orders))


class _Execution:
    """Ranks that run their actions as far as they get."""

    def __init__(self, schedule: PipelineSchedule, actions: Actions, rendezvous: bool) -> None:
        self.schedule, self.actions, self.rendezvous = schedule, actions, rendezvous
        self.at = [0] * len(actions)
        self.done: set[Unit] = set()
        # By sender, receiver and direction: messages in their order, receives with their places in it.
        self.sent: dict[tuple[int, int, UnitKind], list[Unit]] = defaultdict(list)
        self.posted: dict[tuple[int, int, UnitKind], dict[Unit, int]] = defaultdict(dict)
        self.offered = [False] * len(actions)

    def advance(self, rank: int) -> bool:
        """Run a rank until it must wait; whether it got anywhere."""
        first, row = self.at[rank], self.actions[rank]
        while self.at[rank] < len(row) and self.start(rank, row[self.at[rank]]):
            self.at[rank] += 1
            self.offered[rank] = False
        return self.at[rank] > first

    def start(self, rank: int, action: PipelineAction) -> bool:
        """Whether an action ends now; what others see of it is done in any case."""
        if action.kind is ActionKind.COMPUTE:
            if self.missing(rank, action.unit) is not None:
                return False
            self.done.add(action.unit)
            return True
        if action.peer is None:
            _refuse(f"{action} of rank {rank} without a peer")
        if action.kind is ActionKind.RECEIVE:
            posted = self.posted[action.peer, rank, action.unit.kind]
            if action.unit in posted:
                _refuse(f"{action} of rank {rank} twice")
            posted[action.unit] = len(posted)
            return True
        channel = rank, action.peer, action.unit.kind
        if not self.offered[rank]:
            if action.unit not in self.done:
                _refuse(f"{action} of rank {rank} before {action.unit} is computed")
            self.sent[channel].append(action.unit)
            self.offered[rank] = True
        return not self.rendezvous or len(self.posted[channel]) >= len(self.sent[channel])

    def missing(self, rank: int, unit: Unit) -> Unit | None:
        """The first thing that a unit needs and that is not here yet."""
        for need in self.schedule.needs(unit):
            owner = self.schedule.stage_ranks[need.stage]
            here = need in self.done if owner == rank else self.has_come(need, owner, rank)
            if not here:
                return need
        return None

    def has_come(self, message: Unit, sender: int, receiver: int) -> bool:
        channel = sender, receiver, message.kind
        place, sent = self.posted[channel].get(message), self.sent[channel]
        if place is None:
            return False
        if place < len(sent) and sent[place] != message:
            _refuse(f"{sent[place]} sent by rank {sender} into the receive of {message} on rank {receiver}")
        return place < len(sent)

    def waits(self, rank: int) -> str:
        """What a rank that got no further is in, and for what."""
        action = self.actions[rank][self.at[rank]]
        if action.kind is ActionKind.SEND:
            return f"rank {rank} waits in {action} for ever: rank {action.peer} posts no receive of it"
        need = self.missing(rank, action.unit)
        assert need is not None, action
        owner = self.schedule.stage_ranks[need.stage]
        if owner == rank:
            return f"rank {rank} waits in {action} for ever: {need} of its own comes later"
        what = "activation" if need.kind is UnitKind.FORWARD else "gradient"
        lacking = "" if need in self.posted[owner, rank, need.kind] else ", whose receive is not posted"
        return f"rank {rank} waits in {action} for ever: for the {what} of {need} from rank {owner}{lacking}"


def _check_units(schedule: PipelineSchedule) -> None:
    ranks, stages, batches = schedule.num_ranks, schedule.num_stages, schedule.num_micro_batches
    sizes = min(ranks, stages, batches, schedule.slices) >= 1 and len(schedule.orders) == ranks and len(schedule.stage_ranks) == stages
    if not sizes or set(schedule.stage_ranks) != set(range(ranks)):
        _refuse(f"{stages} stages on ranks {schedule.stage_ranks}, {len(schedule.orders)} orders of {ranks} ranks, {batches} micro-batches")
    seen: set[Unit] = set()
    for rank, order in enumerate(schedule.orders):
        for unit in order:
            inside = 0 <= unit.stage < stages and 0 <= unit.micro_batch < batches and 0 <= unit.slice < schedule.slices
            if not inside or schedule.stage_ranks[unit.stage] != rank:
                _refuse(f"{unit} on rank {rank}" + (f", stage {unit.stage} is rank {schedule.stage_ranks[unit.stage]}'s" if inside else ""))
            if unit in seen:
                _refuse(f"{unit} twice")
            seen.add(unit)
    for stage in range(stages):
        for batch in range(batches):
            for piece in range(schedule.slices):
                for kind in (UnitKind.FORWARD, UnitKind.BACKWARD):
                    if (unit := Unit(kind, stage, batch, piece)) not in seen:
                        _refuse(f"no {unit} on rank {schedule.stage_ranks[stage]}")


def _refuse(found: str) -> NoReturn:
    raise PlanError("pipeline schedule", found=found, expected="every unit once, on its stage's rank, after what it needs", hint=_HINT)


def max_in_flight(schedule: PipelineSchedule, rank: int) -> int:
    """Units of a rank that went forward and wait for their last backward pass (W where there is one), at most at one time."""
    waiting = most = 0
    for unit in schedule.orders[rank]:
        last = unit.kind is UnitKind.WEIGHT or (unit.kind is UnitKind.BACKWARD and unit not in schedule.split)
        waiting += (unit.kind is UnitKind.FORWARD) - last
        most = max(most, waiting)
    return most
