"""Measures collectives: all groups of a size at once, over message sizes; fits latency and bandwidth."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist

from ...estimate.measured.profile import FittedCollective, fit_of, least_squares
from ...parallel.topology import Topology

SIZES = tuple(1 << exponent for exponent in (14, 16, 18, 20, 22))
"""Bytes one rank sends."""
REPEATS = 5

Operation = Callable[[dist.ProcessGroup, torch.Tensor, int, int], None]
"""Takes a group, a message, the ranks of the group and which of them this one is."""


def probe_collectives(topology: Topology, device: torch.device, degrees: Sequence[int]) -> tuple[FittedCollective, ...]:
    """Measure what sequence groups and sharded weights use, for each of the degrees. Collective over all ranks."""
    return tuple(_probe(topology, device, degree, kind, operation) for degree in degrees for kind, operation in OPERATIONS.items())


def _probe(topology: Topology, device: torch.device, degree: int, kind: str, operation: Operation) -> FittedCollective:
    seconds = [_seconds(topology, device, degree, size, operation) for size in SIZES]
    rows = [[1.0, float(size)] for size in SIZES]
    latency_s, byte_s = least_squares(rows, seconds)
    fit = fit_of(torch.tensor(rows, dtype=torch.float64).numpy() @ [latency_s, byte_s], torch.tensor(seconds, dtype=torch.float64).numpy())
    return FittedCollective(kind=kind, degree=degree, latency_s=latency_s, bytes_per_s=1 / byte_s if byte_s > 0 else 0.0, fit=fit)


def _seconds(topology: Topology, device: torch.device, degree: int, size: int, operation: Operation) -> float:
    """Seconds of the slowest rank, the least of the repeats. Ranks outside every aligned block of this size only wait."""
    first = topology.stage_rank // degree * degree
    takes_part = first + degree <= topology.stage_size
    message = torch.ones(size // 4 // degree * degree, dtype=torch.float32, device=device)
    times = []
    for _ in range(REPEATS + 1):
        dist.barrier(group=topology.stage)
        begun = time.perf_counter()
        if takes_part:
            group = topology.group(first, degree)
            assert group is not None, "a degree of one sends nothing"
            operation(group, message, degree, topology.stage_rank - first)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        spent = torch.tensor(time.perf_counter() - begun, dtype=torch.float64)
        dist.all_reduce(spent, dist.ReduceOp.MAX, group=topology.stage)
        times.append(float(spent))
    return min(times[1:])


def _all_to_all(group: dist.ProcessGroup, message: torch.Tensor, ranks: int, member: int) -> None:
    dist.all_to_all_single(torch.empty_like(message), message, group=group)


def _neighbours(group: dist.ProcessGroup, message: torch.Tensor, ranks: int, member: int) -> None:
    received = torch.empty_like(message)
    operations = [
        dist.P2POp(dist.isend, message, group=group, group_peer=(member + 1) % ranks),
        dist.P2POp(dist.irecv, received, group=group, group_peer=(member - 1) % ranks),
    ]
    for work in dist.batch_isend_irecv(operations):
        work.wait()


def _gather(group: dist.ProcessGroup, message: torch.Tensor, ranks: int, member: int) -> None:
    gathered = message.new_empty(ranks * message.numel())
    # Newer torch has other names for this and for `_reduce`.
    if hasattr(dist, "all_gather_single"):
        dist.all_gather_single(gathered, message, group=group)
    else:
        dist.all_gather_into_tensor(gathered, message, group=group)


def _reduce(group: dist.ProcessGroup, message: torch.Tensor, ranks: int, member: int) -> None:
    part = message.new_empty(message.numel() // ranks)
    if hasattr(dist, "reduce_scatter_single"):
        dist.reduce_scatter_single(part, message, group=group)
    else:
        dist.reduce_scatter_tensor(part, message, group=group)


OPERATIONS: dict[str, Operation] = {"all-to-all": _all_to_all, "neighbours": _neighbours, "gather": _gather, "reduce": _reduce}
