"""Pages of host memory that a GPU copies to: touched by several threads, in huge pages where the system has them, pinned piece by piece.

Pinning touches every page under a lock of the driver that kernels' launches take too, so it comes in pieces, and after the pages are there.
A copy may not cross from one registered piece into the next: pieces end where what is copied ends.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

PIECE_BYTES = 1 << 30
"""The most that is pinned in one call."""
TOUCH_BYTES = 64 << 20
"""What a thread touches at a time."""
THREADS = 8
"""The most threads that touch: memory is full before more of them help."""


def pieces(num_bytes: int, unit_bytes: int, most_bytes: int = PIECE_BYTES) -> Iterator[tuple[int, int]]:
    """Yield (start, length) of pieces of whole units, as many as `most_bytes` hold, one at least; the last piece may be shorter."""
    length = max(1, most_bytes // unit_bytes) * unit_bytes
    for start in range(0, num_bytes, length):
        yield start, min(length, num_bytes - start)


def advise_huge_pages(memory: mmap.mmap) -> bool:
    """Ask for huge pages, of which pinning needs 512 times fewer; False where the system has none for such memory."""
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return False
    try:
        memory.madvise(mmap.MADV_HUGEPAGE)
    except OSError:
        return False
    return True


def touch(view: Tensor, threads: int | None = None) -> None:
    """Write a zero into every page of `view` (uint8), on `threads` threads; default: the cores of this process, THREADS at most."""
    page, count = mmap.PAGESIZE, threads or min(THREADS, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1)

    def zero(start: int) -> None:
        view[start : start + TOUCH_BYTES : page].zero_()

    with ThreadPoolExecutor(count, thread_name_prefix="touch") as workers:
        # All results are asked for: a failure is raised here.
        for _ in workers.map(zero, range(0, view.numel(), TOUCH_BYTES)):
            pass
