"""Where activations wait on the host between forward and backward: what the layers call, and the store in host memory."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from .allocator import Extent
from .device import Mark, OffloadDevice
from .host_pool import HostArena
from .streams import Transfers, flat_bytes


@dataclass(frozen=True, slots=True, eq=False)
class Parcel:
    """Rows of one tensor that a store was given. Opaque: only the store that made it can do anything with it."""

    shape: torch.Size
    dtype: torch.dtype
    num_bytes: int


@dataclass(frozen=True, slots=True)
class Stats:
    """Since the store was opened."""

    bytes_to_host: int
    bytes_to_device: int
    waits: int
    """Times compute, or with files the host, stood still for a copy; as far as known by now."""
    wait_s: float
    high_water_bytes: int
    """Most host memory, or file, in use at once, ends of blocks included."""
    waste_bytes: int
    """Bytes lost of what is in use now: ends of blocks that hold nothing."""


class HostStore(Protocol):
    """Calls come from one thread at a time (forward's or backward's), in the order in which compute is enqueued.

    Device memory: `put` keeps its rows alive until their copy is done, at most in_flight_bytes of them or one parcel; a parcel
    has a buffer of its size from `prefetch` (or `get`) to `done`. Both hold a view's whole storage.
    """

    def put(self, rows: Tensor) -> Parcel:
        """Start the copy to the host and return. The caller may drop `rows` but must not write into them. PlanError: no room."""
        ...

    def prefetch(self, parcel: Parcel) -> None:
        """Start bringing it back; nothing more if it is on its way already."""
        ...

    def get(self, parcel: Parcel) -> Tensor:
        """The rows on the device, for work enqueued after this; the same tensor until done(), a new one after it."""
        ...

    def done(self, parcel: Parcel) -> None:
        """No work enqueued after this uses what get() returned."""
        ...

    def drop(self, parcel: Parcel) -> None:
        """Free its host space (and be done with it)."""
        ...

    def reset(self) -> None:
        """Drop all parcels there are: those of an aborted step."""
        ...

    def owns(self, address: int) -> bool:
        """Whether a storage at this address is host memory of the store, whatever its tensors' device says."""
        ...

    def close(self) -> None:
        """Wait for copies, and give the host memory or files back. The store cannot be used any more."""
        ...

    @property
    def stats(self) -> Stats: ...


@dataclass(slots=True)
class Waiting:
    """A parcel in host memory."""

    extents: tuple[Extent, ...]
    written: Mark
    landing: Tensor | None = None
    arrived: Mark | None = None


class ArenaStore:
    """The store in host memory."""

    def __init__(self, arena: HostArena, device: OffloadDevice, in_flight_bytes: int) -> None:
        self.arena = arena
        self.device = device
        self._transfers = Transfers(device, in_flight_bytes)
        self._waiting: dict[Parcel, Waiting] = {}
        self._to_host = self._to_device = 0
        self._lock = threading.RLock()

    def put(self, rows: Tensor) -> Parcel:
        with self._lock:
            source = flat_bytes(rows)
            parcel = Parcel(rows.shape, rows.dtype, source.numel())
            extents = self.arena.take(parcel.num_bytes)
            # The blocks of a dropped parcel may still be read, but compute waits for that copy, and this one for compute.
            written = self._transfers.send(source, self.arena.views(extents, parcel.num_bytes))
            self._waiting[parcel] = Waiting(extents, written)
            self._to_host += parcel.num_bytes
            return parcel

    def prefetch(self, parcel: Parcel) -> None:
        with self._lock:
            waiting = self._waiting[parcel]
            if waiting.landing is None:
                waiting.landing = self.device.landing(parcel.num_bytes)
                sources = self.arena.views(waiting.extents, parcel.num_bytes)
                waiting.arrived = self._transfers.bring(sources, waiting.landing, [waiting.written])
                self._to_device += parcel.num_bytes

    def get(self, parcel: Parcel) -> Tensor:
        with self._lock:
            self.prefetch(parcel)
            waiting = self._waiting[parcel]
            assert waiting.landing is not None and waiting.arrived is not None
            self.device.hold(waiting.arrived)
            return waiting.landing.view(parcel.dtype).view(parcel.shape)

    def done(self, parcel: Parcel) -> None:
        with self._lock:
            waiting = self._waiting[parcel]
            if waiting.landing is not None:
                self._transfers.release(waiting.landing)
                waiting.landing = None

    def drop(self, parcel: Parcel) -> None:
        with self._lock:
            self.done(parcel)
            waiting = self._waiting.pop(parcel)
            self.arena.give(waiting.extents, parcel.num_bytes)

    def reset(self) -> None:
        with self._lock:
            self._transfers.drain()
            for parcel in list(self._waiting):
                self.drop(parcel)

    def owns(self, address: int) -> bool:
        return self.arena.owns(address)

    def close(self) -> None:
        with self._lock:
            self.reset()
            # Streams work in order: nothing reads or writes the arena behind these two.
            self.device.to_host([], []).synchronize()
            self.device.to_device([], []).synchronize()
            self.arena.close()

    @property
    def stats(self) -> Stats:
        extents = self.arena.extents
        waits, wait_s = self.device.stalls()
        return Stats(self._to_host, self._to_device, waits, wait_s, extents.high_water_bytes, extents.waste_bytes)
