"""The store in files: through staging buffers and a few worker threads, for steps that leave more than host memory holds."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field

from torch import Tensor

from .allocator import Extent
from .device import Mark, OffloadDevice
from .file_blocks import DIRECT_BYTES, KEY, OffloadFile, WriteMeter, failed
from .host_pool import exhausted
from .host_store import Parcel, Stats
from .staging import Staging
from .streams import Transfers, flat_bytes


@dataclass(frozen=True, slots=True)
class Piece:
    """Bytes [start, start + num_bytes) of a parcel, at `offset` of the file; no more than a slot."""

    offset: int
    start: int
    num_bytes: int

    @property
    def padded_bytes(self) -> int:
        return -(-self.num_bytes // DIRECT_BYTES) * DIRECT_BYTES


@dataclass(slots=True)
class Filed:
    """A parcel in the file."""

    extents: tuple[Extent, ...]
    pieces: tuple[Piece, ...]
    writes: list[Future[None]] = field(default_factory=list)
    landing: Tensor | None = None
    num_asked: int = 0
    """Pieces whose reads have been started, in order."""
    reads: list[tuple[Piece, Extent, Future[None]]] = field(default_factory=list)
    """Those not yet on their way to the device."""
    arrived: Mark | None = None

    @property
    def is_here(self) -> bool:
        return self.num_asked == len(self.pieces) and not self.reads


class FileStore:
    """An ArenaStore with a file instead of host memory; calls may wait for the disk, which `stats` counts.

    A read that is done goes on to the device with the next call of any kind, so prefetch needs calls to follow it.
    Whatever fails in a worker is raised by the next call.
    """

    def __init__(
        self, file: OffloadFile, staging: Staging, device: OffloadDevice, *, in_flight_bytes: int, meter: WriteMeter, num_workers: int = 4
    ) -> None:
        assert staging.slot_bytes % DIRECT_BYTES == 0 and staging.num_slots >= 2
        self.file, self.staging, self.device, self.meter = file, staging, device, meter
        self._transfers = Transfers(device, in_flight_bytes)
        self._workers = ThreadPoolExecutor(num_workers, thread_name_prefix="offload")
        self._filed: dict[Parcel, Filed] = {}
        self._coming: dict[Parcel, Filed] = {}
        self._failure: Exception | None = None
        self._to_host = self._to_device = self._waits = 0
        self._wait_s = 0.0
        self._lock = threading.RLock()

    def put(self, rows: Tensor) -> Parcel:
        with self._lock:
            self._advance()
            source = flat_bytes(rows)
            parcel = Parcel(rows.shape, rows.dtype, source.numel())
            extents = self.file.extents.take(parcel.num_bytes)
            if extents is None:
                larger = f"{KEY}=DIRECTORY on a larger disk with a larger memory.host_budget"
                raise exhausted(f"{KEY}={self.file.directory}", parcel.num_bytes, self.file.extents, larger)
            filed = self._filed[parcel] = Filed(extents, pieces_of(extents, parcel.num_bytes, self.staging.slot_bytes))
            for piece in filed.pieces:
                slot = self._slot()
                copied = self._transfers.send(
                    source[piece.start : piece.start + piece.num_bytes], [self.staging.tensor(slot, piece.num_bytes)]
                )
                filed.writes.append(self._workers.submit(self._write, piece, slot, copied))
            self._to_host += parcel.num_bytes
            return parcel

    def prefetch(self, parcel: Parcel) -> None:
        with self._lock:
            self._ask(parcel)
            self._advance()

    def get(self, parcel: Parcel) -> Tensor:
        with self._lock:
            filed = self._ask(parcel)

            def arrives() -> bool:
                self._advance(first=filed)
                return filed.is_here

            self._wait_until(arrives)
            assert filed.landing is not None
            if filed.arrived is not None:
                self.device.hold(filed.arrived)
            return filed.landing.view(parcel.dtype).view(parcel.shape)

    def done(self, parcel: Parcel) -> None:
        with self._lock:
            self._return(parcel)
            self._advance()

    def drop(self, parcel: Parcel) -> None:
        with self._lock:
            self._return(parcel)
            filed = self._filed.pop(parcel)
            # The same bytes of the file may be another parcel's next: no write may still be on its way there.
            wait(filed.writes)
            self.file.extents.give(filed.extents, parcel.num_bytes)

    def reset(self) -> None:
        with self._lock:
            self._transfers.drain()
            for parcel in list(self._filed):
                self.drop(parcel)

    def owns(self, address: int) -> bool:
        return self.staging.arena.owns(address)

    def close(self) -> None:
        with self._lock:
            self.reset()
            self._workers.shutdown()
            while self.staging.take() is not None:
                pass
            self.staging.arena.close()
            self.file.close()

    @property
    def stats(self) -> Stats:
        stalls, stalled_s = self.device.stalls()
        extents = self.file.extents
        waits, wait_s = self._waits + stalls, self._wait_s + stalled_s
        return Stats(self._to_host, self._to_device, waits, wait_s, extents.high_water_bytes, extents.waste_bytes)

    def _ask(self, parcel: Parcel) -> Filed:
        filed = self._filed[parcel]
        if filed.landing is None:
            filed.landing = self.device.landing(parcel.num_bytes)
            self._coming[parcel] = filed
            self._to_device += parcel.num_bytes
        return filed

    def _return(self, parcel: Parcel) -> None:
        filed = self._filed[parcel]
        for _, slot, read in filed.reads:
            wait([read])
            self.staging.give(slot)
        filed.reads.clear()
        filed.num_asked = 0
        self._coming.pop(parcel, None)
        if filed.landing is not None:
            self._transfers.release(filed.landing)
            filed.landing = None

    def _advance(self, first: Filed | None = None) -> None:
        """Send on what has been read, and read what has been asked for: the parcel `first`, others while half the slots are free."""
        if self._failure is not None:
            raise failed(self.file.directory, self._failure) from self._failure
        for filed in list(self._coming.values()):
            self._send_on(filed)
        if first is not None:
            self._read_on(first)
        for filed in self._coming.values():
            self._read_ahead(filed)
        self._coming = {parcel: filed for parcel, filed in self._coming.items() if not filed.is_here}

    def _send_on(self, filed: Filed) -> None:
        assert filed.landing is not None
        # One that failed stays: its parcel never counts as here, and the next call raises _failure.
        ready = [entry for entry in filed.reads if entry[2].done() and entry[2].exception() is None]
        filed.reads = [entry for entry in filed.reads if entry not in ready]
        for piece, slot, _ in ready:
            target = filed.landing[piece.start : piece.start + piece.num_bytes]
            filed.arrived = self._transfers.bring([self.staging.tensor(slot, piece.num_bytes)], target, [])
            self.staging.give(slot, filed.arrived)

    def _read_on(self, filed: Filed) -> None:
        while filed.num_asked < len(filed.pieces) and (slot := self.staging.take()) is not None:
            self._start_read(filed, slot)

    def _read_ahead(self, filed: Filed) -> None:
        while filed.num_asked < len(filed.pieces) and self.staging.num_free > self.staging.num_slots // 2:
            slot = self.staging.take(at_once=True)
            if slot is None:
                return
            self._start_read(filed, slot)

    def _start_read(self, filed: Filed, slot: Extent) -> None:
        piece = filed.pieces[filed.num_asked]
        read = self._workers.submit(self._read, piece, slot, filed.writes[filed.num_asked])
        filed.reads.append((piece, slot, read))
        filed.num_asked += 1
        read.add_done_callback(lambda _: self.staging.announce())

    def _slot(self) -> Extent:
        def frees() -> bool:
            self._advance()
            return self.staging.num_free > 0

        self._wait_until(frees)
        slot = self.staging.take()
        assert slot is not None, "only this thread takes"
        return slot

    def _wait_until(self, is_so: Callable[[], bool]) -> None:
        """Ask again whenever a worker has done something."""
        start = time.perf_counter()
        waited = False
        while True:
            version = self.staging.version
            if is_so():
                break
            waited = True
            self.staging.wait_beyond(version)
        if waited:
            self._waits += 1
            self._wait_s += time.perf_counter() - start

    def _write(self, piece: Piece, slot: Extent, copied: Mark) -> None:
        """Runs in a worker. Writes were submitted before the reads that wait for them, so workers never wait in a circle."""
        try:
            copied.synchronize()
            with self.meter:
                self.file.write(self.staging.buffer(slot, piece.padded_bytes), piece.offset)
            self.meter.wrote(piece.num_bytes)
        except Exception as error:
            self._failure = self._failure or error
            raise
        finally:
            self.staging.give(slot)

    def _read(self, piece: Piece, slot: Extent, write: Future[None]) -> None:
        try:
            write.result()
            self.file.read(self.staging.buffer(slot, piece.padded_bytes), piece.offset)
        except Exception as error:
            self._failure = self._failure or error
            raise


def pieces_of(extents: Sequence[Extent], num_bytes: int, most_bytes: int) -> tuple[Piece, ...]:
    """`num_bytes` of a parcel over its extents, in pieces of at most `most_bytes`."""
    pieces, start = [], 0
    for extent in extents:
        for offset in range(extent.start, extent.stop, most_bytes):
            length = min(most_bytes, extent.stop - offset, num_bytes - start)
            if length > 0:
                pieces.append(Piece(offset, start, length))
                start += length
    assert start == num_bytes, "the extents hold it all"
    return tuple(pieces)
