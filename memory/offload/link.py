"""How fast this machine really moves activations: links between device and host, and a directory's disk."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from .arena import HostArena
from .cuda import CudaPinner
from .device import Mark
from .files import OffloadFile
from .open import device_for

COPY_BYTES = 64 << 20


@dataclass(frozen=True, slots=True)
class HostLink:
    """One rank's share of the way between device and host, in bytes per second, each direction by itself."""

    bytes_per_s_to_host: float
    bytes_per_s_to_device: float


@dataclass(frozen=True, slots=True)
class DiskLink:
    """One rank's share of a directory's disk, in bytes per second."""

    bytes_per_s_written: float
    bytes_per_s_read: float


def measure_host_link(device: torch.device, seconds: float, *, copy_bytes: int = COPY_BYTES) -> HostLink:
    """Copies of `copy_bytes` for `seconds`, half of it each way, through the same streams and memory as activations.

    GPUs of a node share the way to its memory: start it on all ranks of the node together (a barrier before it is the
    caller's), so that each measures what it gets while the others copy too. Needs 2 copy_bytes of host and of device memory.
    """
    arena = HostArena(2 * copy_bytes, pinner=CudaPinner(device) if device.type == "cuda" else None)
    streams = device_for(device)
    hosts = [arena.views(arena.take(copy_bytes), copy_bytes)[0] for _ in range(2)]
    buffers = [streams.landing(copy_bytes) for _ in hosts]
    try:
        out = rate_of(lambda i: streams.to_host([(buffers[i], hosts[i])], []), copy_bytes, seconds / 2)
        back = rate_of(lambda i: streams.to_device([(hosts[i], buffers[i])], []), copy_bytes, seconds / 2)
    finally:
        hosts.clear()
        arena.close()
    return HostLink(out, back)


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


def measure_directory(directory: str, seconds: float, *, file_bytes: int = 4 << 30, copy_bytes: int = COPY_BYTES) -> DiskLink:
    """Writes, then reads, of one thread for `seconds` together, over a file of `file_bytes` (ConfigError if it cannot be had).

    On all ranks of a node together, as above. Where the filesystem takes no direct writes this measures its cache.
    """
    file = OffloadFile(Path(directory), max(file_bytes, 2 * copy_bytes))
    arena = HostArena(copy_bytes)
    data = arena.buffer(arena.take(copy_bytes)[0])
    num_places = file.extents.capacity_bytes // copy_bytes
    try:
        written = _pass_rate(lambda i: file.write(data, i % num_places * copy_bytes), copy_bytes, seconds / 2)
        read = _pass_rate(lambda i: file.read(data, i % num_places * copy_bytes), copy_bytes, seconds / 2)
    finally:
        file.close()
    return DiskLink(written, read)


def _pass_rate(do: Callable[[int], None], copy_bytes: int, seconds: float) -> float:
    begin, num_copies = time.perf_counter(), 0
    while True:
        do(num_copies)
        num_copies += 1
        elapsed = time.perf_counter() - begin
        if elapsed >= seconds:
            return num_copies * copy_bytes / max(elapsed, 1e-9)
