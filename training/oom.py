"""Out-of-memory errors of a rank, turned into a report: who, where, ledger against allocator, and what to type (memory/oom.py)."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import psutil
import torch
import torch.distributed as dist

from ..memory.ledger import Ledger
from ..memory.oom import Numbers, oom_report, requested_bytes
from ..memory.position import Position

LOW_HOST_BYTES = 64 << 20
"""Of each rank of a node: with less than this left between two steps, the run saves and ends before the kernel ends it."""


@contextmanager
def memory_errors_named(
    ledger: Ledger, position: Position, device: torch.device, *, step: Callable[[], int], resume: str
) -> Iterator[None]:
    """OutOfMemory in place of what an allocator raises inside; every other error passes."""
    resident = psutil.Process().memory_info().rss
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        numbers = numbers_of(ledger, device, requested_bytes(str(error)), resident)
        # The frames hold the step's tensors; what follows needs room of its own.
        traceback.clear_frames(error.__traceback__)
        raise oom_report(ledger, numbers, position, rank=dist.get_rank(), step=step(), resume=resume) from error


def is_out_of_memory(error: BaseException) -> bool:
    """On a device, on the host (pinned or not), in Python itself. Torch's CPU allocator raises a plain RuntimeError."""
    texts = ("can't allocate memory", "out of memory")
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or (
        isinstance(error, RuntimeError) and any(text in str(error).lower() for text in texts)
    )


def numbers_of(ledger: Ledger, device: torch.device, requested: int, resident_before: int) -> Numbers:
    """What the allocator says now. On a CPU nobody counts tensors: what resident memory has grown by stands for them."""
    if device.type != "cuda":
        weights = sum(term.num_bytes for term in ledger.device.terms if term.name == "weights")
        active = weights + max(0, psutil.Process().memory_info().rss - resident_before)
        return Numbers(requested=requested, active=active, reserved=active, total=ledger.device.capacity_bytes)
    active, reserved = torch.cuda.memory_allocated(device), torch.cuda.memory_reserved(device)
    free, total = torch.cuda.mem_get_info(device)
    planned = sum(term.num_bytes for term in ledger.device.terms if term.name in ("context", "communicators"))
    others = max(0, total - free - reserved - planned)
    return Numbers(requested=requested, active=active, reserved=reserved, total=total, others=others)
