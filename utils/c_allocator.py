"""Sets what the C library's allocator does with freed blocks. Only glibc has such settings; elsewhere nothing changes."""

from __future__ import annotations

import ctypes

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
"""Parameters of mallopt(3)."""
LARGE_BYTES = 1 << 20
"""Blocks that go back to the system when they are freed."""


def return_freed_blocks(large_bytes: int = LARGE_BYTES) -> bool:
    """Has freed blocks of `large_bytes` and more go back to the system at once, in this process; False where that cannot be had.

    By itself glibc raises its threshold to the largest block that was ever freed, up to 32 MiB, and keeps what is smaller in heaps:
    a process of training on a CPU then holds far more than its tensors, and more with every step. The price is that pages of
    large blocks are mapped again: `python -m efflaunch.bench.freed_blocks` measures it.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    return bool(mallopt(_M_MMAP_THRESHOLD, large_bytes)) and bool(mallopt(_M_TRIM_THRESHOLD, large_bytes))
