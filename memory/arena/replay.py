"""The arena at work: a step is recorded, or its requests are served from a plan's addresses. See guard.h for what is checked."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np

from .build import build, cpu_recipe, default_cache
from .plan import ArenaPlan
from .trace import Trace, trace_of

CPU_ALIGNMENT = 64
"""Bytes: that of torch's own CPU allocator."""


@dataclass(frozen=True, slots=True)
class Counts:
    """What became of the requests of one step; the order is that of guard.h."""

    served: int
    """Requests served from the plan, in its order."""
    out_of_order: int
    """Requests served from the plan, at the address of an entry further on or passed over, found free."""
    outside: int
    """Left out of the arena by the plan: they outlive the step."""
    foreign: int
    """Requests of other threads (CPU) or streams (CUDA), which never use the arena."""
    fallback: int
    """Requests of a size the plan does not have there, or whose address was taken: served by the default allocator."""
    fallback_bytes: int
    fallback_peak_bytes: int
    """Most bytes outside the arena live at one time."""
    arena_peak_bytes: int
    """Highest address in use."""

    @property
    def requests(self) -> int:
        return self.served + self.out_of_order + self.outside + self.fallback


class Arena:
    """The allocator of this process. One step at a time; the memory stays reserved between steps."""

    def __init__(self, library: ctypes.CDLL, alignment: int) -> None:
        self._library, self.alignment = library, alignment
        for name in ("arena_bytes", "arena_num_live", "arena_num_events"):
            getattr(library, name).restype = ctypes.c_int64

    def _owner(self) -> int:
        """On CUDA the stream whose requests are the step's; on CPU it is the calling thread, which needs no name."""
        return 0

    def device_peak_bytes(self) -> int | None:
        """Most bytes ever in use on CUDA, arena included: torch's own statistics end with its allocator. None on CPU."""
        return None

    @property
    def reserved_bytes(self) -> int:
        return int(self._library.arena_bytes())

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Requests of this thread inside are written down; `trace` then has them."""
        self._library.arena_begin_record(ctypes.c_uint64(self._owner()))
        try:
            yield
        finally:
            self._library.arena_end()

    def trace(self) -> Trace:
        """The trace of the last recording."""
        events = np.empty((int(self._library.arena_num_events()), 2), dtype=np.int64)
        self._library.arena_events(_pointer(events))
        return trace_of((number, size) for number, size in events.tolist())

    def reserve(self, num_bytes: int) -> bool:
        """Make the arena at least this large; False where what is there is still in use. MemoryError where there is no room."""
        if num_bytes <= self.reserved_bytes:
            return True
        code = self._library.arena_reserve(ctypes.c_int64(num_bytes))
        if code == 1:
            raise MemoryError(f"no {num_bytes} bytes for the arena")
        return bool(code == 0)

    def release(self) -> bool:
        """Give the memory back; False where it is in use."""
        return bool(self._library.arena_reserve(ctypes.c_int64(0)) == 0)

    @contextmanager
    def replaying(self, plan: ArenaPlan) -> Iterator[None]:
        """Requests of this thread inside are served at the plan's addresses, checked one by one; `counts` then has the outcome."""
        assert plan.alignment % self.alignment == 0, "the plan's addresses are less aligned than this device's"
        sizes, offsets = np.array(plan.sizes, dtype=np.int64), np.array(plan.offsets, dtype=np.int64)
        self._library.arena_begin_replay(ctypes.c_uint64(self._owner()), ctypes.c_int64(len(sizes)), _pointer(sizes), _pointer(offsets))
        try:
            yield
        finally:
            self._library.arena_end()

    def counts(self) -> Counts:
        """Counts of the last recording or replay."""
        numbers = np.zeros(len(fields(Counts)), dtype=np.int64)
        self._library.arena_counts(_pointer(numbers))
        return Counts(*numbers.tolist())


def open_cpu_arena(cache: Path | None = None) -> Arena:
    """Put the arena before torch's CPU allocator, for the rest of this process; again is harmless.

    Tensors made earlier stay where they are; storages that are resized keep the allocator they were made with, so this comes
    before the model is built. ConfigError where it cannot be built.
    """
    library = ctypes.CDLL(str(build(cpu_recipe(), cache or default_cache())))
    library.arena_install()
    return Arena(library, CPU_ALIGNMENT)


def _pointer(array: np.ndarray) -> ctypes.c_void_p:
    return ctypes.c_void_p(array.ctypes.data)
