"""One step's allocations as rectangles: bytes, from one event to another. Pure.

Time is the index of an event (an allocation or a release), never an operation: an operation allocates its output before its
dead inputs go, and lifetimes in operations would let the two share an address.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import accumulate


@dataclass(frozen=True, slots=True)
class Trace:
    """Allocations in the order of their births; each lives in [births[i], deaths[i])."""

    sizes: tuple[int, ...]
    """Bytes as they were asked for."""
    births: tuple[int, ...]
    deaths: tuple[int, ...]
    num_events: int
    """An allocation that was not released within the trace dies here."""

    def __post_init__(self) -> None:
        if not len(self.sizes) == len(self.births) == len(self.deaths):
            raise ValueError("sizes, births and deaths have one entry per allocation each")
        if any(size < 1 for size in self.sizes):
            raise ValueError("an allocation has at least one byte")
        if any(not 0 <= a < b <= self.num_events for a, b in zip(self.births, self.deaths, strict=True)):
            raise ValueError(f"an allocation is born before it dies, both within {self.num_events} events")

    def __len__(self) -> int:
        return len(self.sizes)

    def outlives(self, index: int) -> bool:
        """Whether the allocation is still there when the trace ends."""
        return self.deaths[index] == self.num_events

    def live_bytes(self, alignment: int = 1) -> list[int]:
        """After each event, with every size rounded up to `alignment`."""
        change = [0] * (self.num_events + 1)
        for size, birth, death in zip(self.sizes, self.births, self.deaths, strict=True):
            change[birth] += round_up(size, alignment)
            change[death] -= round_up(size, alignment)
        return list(accumulate(change[: self.num_events]))

    def max_live(self, alignment: int = 1) -> int:
        """Bytes: no placement is lower."""
        return max(self.live_bytes(alignment), default=0)

    def within(self) -> Trace:
        """Without what outlives the trace; event indices stay."""
        kept = [index for index in range(len(self)) if not self.outlives(index)]
        sizes, births, deaths = (tuple(column[index] for index in kept) for column in (self.sizes, self.births, self.deaths))
        return Trace(sizes, births, deaths, self.num_events)

    def digest(self) -> str:
        """A hash of every size, birth and death: two traces are the same, or they are not."""
        return hashlib.sha256(repr((self.sizes, self.births, self.deaths, self.num_events)).encode()).hexdigest()[:16]


def trace_of(events: Iterable[tuple[int, int]]) -> Trace:
    """Makes a trace from (key, bytes) for an allocation and (key, 0) for its release, in order; a key may be used again after its release.

    Releases of keys that were never allocated belong to what was there before, and take no time.
    """
    sizes, births, deaths = list[int](), list[int](), list[int]()
    live, time = dict[int, int](), 0
    for key, num_bytes in events:
        if num_bytes:
            assert key not in live, "a key stands for one allocation at a time"
            live[key] = len(sizes)
            sizes.append(num_bytes)
            births.append(time)
            deaths.append(-1)
        elif key in live:
            deaths[live.pop(key)] = time
        else:
            continue
        time += 1
    return Trace(tuple(sizes), tuple(births), tuple(time if death < 0 else death for death in deaths), time)


def round_up(num_bytes: int, alignment: int) -> int:
    return -(-num_bytes // alignment) * alignment
