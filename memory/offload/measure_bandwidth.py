"""How fast this machine really moves activations: links between device and host, and a directory's disk."""

from __future__ import annotations

import statistics
import time
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from ...cluster.rates import Copies
from .cuda import CudaPinner
from .device import Mark
from .file_blocks import OffloadFile
from .host_pool import HostArena
from .open import device_for

COPY_BYTES = 64 << 20
ROUNDS = 3
"""Rounds of each direction, taken in turns: the median counts, for what disturbs one of them is not the machine's."""


class Both:
    """The mark of two copies: past once both are."""

    def __init__(self, marks: Sequence[Mark]) -> None:
        self._marks = marks

    def query(self) -> bool:
        return all(mark.query() for mark in self._marks)

    def synchronize(self) -> None:
        for mark in self._marks:
            mark.synchronize()


def measure_host_link(
    device: torch.device, seconds: float, *, copy_bytes: int = COPY_BYTES, together: Callable[[], object] = lambda: None
) -> Copies:
    """Copies of `copy_bytes` for `seconds` in all, one way, the other and both at once, on the streams and memory of activations.

    GPUs of a node share the way to its memory: `together` is a barrier of the node's ranks, called before each round, so that
    each rank measures what it gets while the others copy too. Needs 4 copy_bytes of host and of device memory.
    """
    arena = HostArena(4 * copy_bytes, pinner=CudaPinner(device) if device.type == "cuda" else None)
    streams = device_for(device)
    hosts = [arena.views(arena.take(copy_bytes), copy_bytes)[0] for _ in range(4)]
    buffers = [streams.landing(copy_bytes) for _ in hosts]

    def out(i: int) -> Mark:
        return streams.to_host([(buffers[i], hosts[i])], [])

    def back(i: int) -> Mark:
        return streams.to_device([(hosts[i + 2], buffers[i + 2])], [])

    def both(i: int) -> Mark:
        return Both([out(i), back(i)])

    try:
        # Pages that were never written are all the same one: reading them would measure a cache.
        for memory in (*hosts, *buffers):
            memory.fill_(1)
        streams.mark().synchronize()
        one_way, other_way, at_once = _medians([out, back, both], copy_bytes, seconds, together)
    finally:
        hosts.clear()
        arena.close()
    return Copies(out=one_way, back=other_way, both_out=at_once, both_back=at_once)


def _medians(starts: Sequence[Callable[[int], Mark]], copy_bytes: int, seconds: float, together: Callable[[], object]) -> tuple[float, ...]:
    """The median rate of each over ROUNDS rounds that take turns."""
    rates: list[list[float]] = [[] for _ in starts]
    for _ in range(ROUNDS):
        for samples, start in zip(rates, starts, strict=True):
            together()
            samples.append(rate_of(start, copy_bytes, seconds / (ROUNDS * len(starts))))
    return tuple(statistics.median(samples) for samples in rates)


def rate_of(start: Callable[[int], Mark], copy_bytes: int, seconds: float, clock: Callable[[], float] = time.perf_counter) -> float:
    """Bytes per second of `start(0)`, `start(1)`, `start(0)` ... with two under way at a time; the first two warm up."""
    for warm in (start(0), start(1)):
        warm.synchronize()
    begin, num_copies = clock(), 0
    under_way = deque([start(0), start(1)])
    while True:
        under_way.popleft().synchronize()
        num_copies += 1
        elapsed = clock() - begin
        if elapsed >= seconds:
            break
        under_way.append(start((num_copies + 1) % 2))
    for mark in under_way:
        mark.synchronize()
    return num_copies * copy_bytes / max(elapsed, 1e-9)


def measure_directory(
    directory: str,
    seconds: float,
    *,
    file_bytes: int = 1 << 30,
    copy_bytes: int = COPY_BYTES,
    together: Callable[[], object] = lambda: None,
) -> Copies:
    """Writes, reads, and both in turns, of one thread for `seconds` in all, over a file of `file_bytes` (ConfigError if it cannot be had).

    `together`: a barrier of the node's ranks, called before each round, for they share the disk. Where the filesystem takes no
    direct writes this measures its cache.
    """
    file = OffloadFile(Path(directory), max(file_bytes, 2 * copy_bytes))
    arena = HostArena(copy_bytes)
    data = arena.buffer(arena.take(copy_bytes)[0])[:copy_bytes]
    num_places = file.extents.capacity_bytes // copy_bytes

    def write(i: int) -> None:
        file.write(data, i % num_places * copy_bytes)

    def read(i: int) -> None:
        file.read(data, i % num_places * copy_bytes)

    def turns(i: int) -> None:
        write(2 * i)
        read(2 * i + 1)

    try:
        # Once over the file: reads of what was never written touch no disk.
        together()
        for place in range(num_places):
            write(place)
        written, got, both = (_pass_rate(do, copy_bytes, seconds / 3, together) for do in (write, read, turns))
    finally:
        file.close()
        arena.close()
    return Copies(out=written, back=got, both_out=both, both_back=both)


def _pass_rate(do: Callable[[int], None], copy_bytes: int, seconds: float, together: Callable[[], object]) -> float:
    together()
    begin, num_copies = time.perf_counter(), 0
    while True:
        do(num_copies)
        num_copies += 1
        elapsed = time.perf_counter() - begin
        if elapsed >= seconds:
            return num_copies * copy_bytes / max(elapsed, 1e-9)
