"""Buffers between a device and a file: each is with the device, with a worker, or free behind the mark of its last copy."""

from __future__ import annotations

import threading
from collections import deque

from torch import Tensor

from .allocator import Extent
from .device import Mark
from .host_pool import HostArena

PIECE_BYTES = 16 << 20
STAGING_BYTES = 512 << 20


def staging_bytes_for(capacity_bytes: int, most_bytes: int = STAGING_BYTES, piece_bytes: int = PIECE_BYTES) -> int:
    """Host memory of a rank that moves `capacity_bytes` to files: no more than it moves, two pieces at least."""
    pieces = min(-(-capacity_bytes // piece_bytes), most_bytes // piece_bytes)
    return max(2, pieces) * piece_bytes


class Staging:
    """Slots of one size, cut from an arena. Any thread gives, one thread takes."""

    def __init__(self, arena: HostArena) -> None:
        self.arena = arena
        self.slot_bytes = arena.extents.block_bytes
        self._changed = threading.Condition()
        self._version = 0
        slots = [Extent(start, self.slot_bytes) for start in range(0, arena.extents.capacity_bytes, self.slot_bytes)]
        self.num_slots = len(slots)
        self._free: deque[tuple[Extent, Mark | None]] = deque((slot, None) for slot in slots)

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def version(self) -> int:
        """Changes with every give() and announce()."""
        return self._version

    def take(self, *, at_once: bool = False) -> Extent | None:
        """The slot that has been free longest, once its last copy is done; None if none is free, or at_once would mean waiting."""
        with self._changed:
            if not self._free or (at_once and (last := self._free[0][1]) is not None and not last.query()):
                return None
            slot, mark = self._free.popleft()
        if mark is not None:
            mark.synchronize()
        return slot

    def give(self, slot: Extent, mark: Mark | None = None) -> None:
        """Free after the mark."""
        with self._changed:
            self._free.append((slot, mark))
        self.announce()

    def announce(self) -> None:
        """Something changed that the taker may wait for."""
        with self._changed:
            self._version += 1
            self._changed.notify_all()

    def wait_beyond(self, version: int) -> None:
        """Return once the version is another one."""
        with self._changed:
            self._changed.wait_for(lambda: self._version != version)

    def tensor(self, slot: Extent, num_bytes: int) -> Tensor:
        return self.arena.views([slot], num_bytes)[0]

    def buffer(self, slot: Extent, num_bytes: int) -> memoryview:
        return self.arena.buffer(slot)[:num_bytes]
