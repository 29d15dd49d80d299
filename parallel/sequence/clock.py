"""How long a group was busy: the time inside its own work, not what it waits for ranks of other groups.

Layers and the loss run inside `BusyClock.running()`; gathers of weights and reductions of gradients, where all ranks meet,
lie between them. Waiting inside a group (exchanges, ring hops) is the group's own time, but not the rank's: it is counted apart, inside
`BusyClock.waiting()`. On CUDA nothing is waited for while the step runs: events are read once it has ended.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class BusyClock:
    """Busy seconds of one rank in one micro-batch."""

    __slots__ = ("_busy", "_waits")

    def __init__(self, device: torch.device) -> None:
        self._busy, self._waits = _Spans(device), _Spans(device)

    @contextmanager
    def running(self) -> Iterator[None]:
        """What happens inside is counted."""
        with self._busy.one():
            yield

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Within running(): for the other ranks of the group. On CUDA it is what the compute stream waits for."""
        with self._waits.one():
            yield

    def seconds(self) -> float:
        """All so far. On CUDA it waits for the last event."""
        return self._busy.seconds()

    def own_seconds(self) -> float:
        """All so far without the waits: what this rank alone takes."""
        return max(0.0, self._busy.seconds() - self._waits.seconds())


class _Spans:
    __slots__ = ("_device", "_events", "_seconds")

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._seconds = 0.0
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def one(self) -> Iterator[None]:
        if self._device.type != "cuda":
            started = time.perf_counter()
            yield
            self._seconds += time.perf_counter() - started
            return
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()  # type: ignore[no-untyped-call]
        yield
        end.record()  # type: ignore[no-untyped-call]
        self._events.append((begin, end))

    def seconds(self) -> float:
        for begin, end in self._events:
            end.synchronize()
            self._seconds += begin.elapsed_time(end) / 1000
        self._events = []
        return self._seconds
