"""Turns a rank's out-of-memory error into a report: who, where, ledger against allocator, what to type (oom_report.py)."""

from __future__ import annotations

import socket
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import psutil
import torch
import torch.distributed as dist

from ..estimate.ledger import Ledger
from ..estimate.oom_report import Numbers, OutOfMemory, host_report, oom_report, requested_bytes
from ..memory.offload.checks import free_memory
from ..memory.position import Position
from ..parallel.topology import whole_world

LOW_HOST_BYTES = 64 << 20
"""Least free host memory, for each rank of a node: with less between two steps, the run saves and ends before the kernel ends it."""


@contextmanager
def memory_errors_named(
    ledger: Ledger, position: Position, device: torch.device, *, step: Callable[[], int], resume: str
) -> Iterator[None]:
    """Raise OutOfMemory in place of what an allocator raises inside; every other error passes."""
    resident = psutil.Process().memory_info().rss
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        numbers = numbers_of(ledger, device, requested_bytes(str(error)), resident)
        # The frames hold the step's tensors; what follows needs room of its own.
        traceback.clear_frames(error.__traceback__)
        raise oom_report(ledger, numbers, position, rank=dist.get_rank(whole_world()), step=step(), resume=resume) from error


def host_error(ledger: Ledger, rank: int, free_bytes: int, *, step: int, resume: str) -> OutOfMemory:
    """The error where the node of `rank` has only `free_bytes` left. That node says its name and what limits it. Collective."""
    payload: list[tuple[str, str] | None] = [None]
    world = whole_world()
    if dist.get_rank(world) == rank:
        payload[0] = socket.gethostname(), free_memory().limited_by
    dist.broadcast_object_list(payload, rank, group=world, device=torch.device("cpu"))
    assert payload[0] is not None
    node, limited_by = payload[0]
    return host_report(ledger, free_bytes, limited_by, rank=rank, node=node, step=step, resume=resume)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out: on a device, on the host (pinned or not), in Python. Torch's CPU allocator raises RuntimeError."""
    texts = ("can't allocate memory", "out of memory")
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or (
        isinstance(error, RuntimeError) and any(text in str(error).lower() for text in texts)
    )


def numbers_of(ledger: Ledger, device: torch.device, requested: int, resident_before: int) -> Numbers:
    """The allocator's present figures. On a CPU nobody counts tensors: what resident memory has grown by stands for them."""
    if device.type != "cuda":
        weights = sum(term.num_bytes for term in ledger.device.terms if term.name == "weights")
        active = weights + max(0, psutil.Process().memory_info().rss - resident_before)
        return Numbers(requested=requested, active=active, reserved=active, total=ledger.device.capacity_bytes)
    free, total = torch.cuda.mem_get_info(device)
    planned = sum(term.num_bytes for term in ledger.device.terms if term.name in ("context", "communicators"))
    if torch.cuda.get_allocator_backend() == "pluggable":
        # memory.arena=planned: there are no statistics, and asking for them is an error of its own.
        in_use = max(0, total - free - planned)
        return Numbers(requested=requested, active=in_use, reserved=in_use, total=total)
    active, reserved = torch.cuda.memory_allocated(device), torch.cuda.memory_reserved(device)
    others = max(0, total - free - reserved - planned)
    return Numbers(requested=requested, active=active, reserved=reserved, total=total, others=others)
