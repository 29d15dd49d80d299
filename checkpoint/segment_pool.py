"""Tracks which snapshot-pool segments are in use, with generations: a stale release is noticed, never obeyed.

Note: ring. A segment is free, or handed out under exactly one ticket. Tickets are (segment, generation); a segment's
generation grows with every hand-out, so a ticket names one use of one segment for ever. Releasing anything but a live
ticket is an error: two uses of the same bytes would be a torn checkpoint.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from typing import NamedTuple


class Ticket(NamedTuple):
    """One use of one segment."""

    segment: int
    generation: int


class StaleTicketError(Exception):
    """Raised where a segment is released that is not in use under that ticket."""


class SegmentPool:
    """Hands out segments, oldest-freed first. Thread-safe."""

    def __init__(self, num_segments: int) -> None:
        assert num_segments >= 1
        self.num_segments = num_segments
        self._generations = [0] * num_segments
        self._live: set[Ticket] = set()
        self._free = deque(range(num_segments))
        self._changed = threading.Condition()

    @property
    def num_free(self) -> int:
        return len(self._free)

    def acquire(self, given_up: Callable[[], bool] = lambda: False) -> Ticket | None:
        """A free segment, waiting for one; None once `given_up()` (asked a few times a second) says so."""
        with self._changed:
            while not self._free:
                if given_up():
                    return None
                self._changed.wait(0.1)
            return self._hand_out()

    def _hand_out(self) -> Ticket:
        segment = self._free.popleft()
        self._generations[segment] += 1
        ticket = Ticket(segment, self._generations[segment])
        self._live.add(ticket)
        return ticket

    def release(self, ticket: Ticket) -> None:
        """Release a segment; StaleTicketError where it is not in use under this ticket."""
        with self._changed:
            if ticket not in self._live:
                raise StaleTicketError(f"segment {ticket.segment}, generation {ticket.generation}: now {self._generations[ticket.segment]}")
            self._live.remove(ticket)
            self._free.append(ticket.segment)
            self._changed.notify_all()

    def reset(self) -> None:
        """Free every segment: whoever used them is gone. Old tickets stay stale."""
        with self._changed:
            self._live.clear()
            self._free = deque(range(self.num_segments))
            self._changed.notify_all()
