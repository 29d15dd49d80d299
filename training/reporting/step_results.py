"""Gathers each rank's results after the backward of a step in one collective, the same answer on every rank."""

from __future__ import annotations

import socket
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from ...memory.offload.checks import free_memory
from ...parallel.sequence.clock import BusyClock


@dataclass(frozen=True, slots=True)
class Results:
    """The results of one step; lists are in rank order."""

    loss: float
    tokens: list[int]
    peak_bytes: list[int]
    stop: bool
    host_free_bytes: list[int]
    """Free host bytes on each rank's node."""
    busy_s: list[list[float]]
    """Busy seconds of each rank of a stage in each micro-batch: of several stages, the longest."""
    own_s: list[float]
    """Seconds of each rank in all micro-batches, without waits for other ranks."""
    objective: list[float]
    """Sums of the objective's numbers over all ranks."""


def gather_results(
    world: dist.ProcessGroup,
    share: torch.Tensor,
    stats: torch.Tensor,
    clocks: Sequence[BusyClock],
    *,
    tokens: int,
    peak_bytes: int,
    stop: bool,
    num_stages: int = 1,
) -> Results:
    """Gather what each rank of `world` has. Collective. `busy_s` has the ranks of a stage: the longest of any.

    `share` (scalar) of the loss, `stats` of the objective: this rank's, on its device. Summed in rank order, so bit-equal everywhere."""
    row = [float(share), float(tokens), float(peak_bytes), float(stop), float(free_memory().num_bytes)]
    row += [sum(clock.own_seconds() for clock in clocks), *stats.tolist(), *(clock.seconds() for clock in clocks)]
    mine = torch.tensor(row, dtype=torch.float64, device=share.device)
    table = [torch.empty_like(mine) for _ in range(dist.get_world_size(world))]
    dist.all_gather(table, mine, group=world)
    losses, counts, peaks, stops, free, own, *rest = torch.stack(table).T.tolist()
    sums, busy = [sum(column) for column in rest[: len(stats)]], [_slowest_stage(column, num_stages) for column in rest[len(stats) :]]
    return Results(
        loss=sum(losses),
        tokens=[int(n) for n in counts],
        peak_bytes=[int(n) for n in peaks],
        stop=any(stops),
        host_free_bytes=[int(n) for n in free],
        busy_s=[list(times) for times in zip(*busy, strict=True)],
        own_s=own,
        objective=sums,
    )


def _slowest_stage(values: Sequence[float], num_stages: int) -> list[float]:
    """The most of each place in a stage, from values by rank."""
    size = len(values) // num_stages
    return [max(values[place::size]) for place in range(size)]


def host_names(world: dist.ProcessGroup) -> list[str]:
    """The name of every rank's machine, in rank order. Collective over `world`."""
    names: list[str] = [""] * dist.get_world_size(world)
    dist.all_gather_object(names, socket.gethostname(), group=world)
    return names
