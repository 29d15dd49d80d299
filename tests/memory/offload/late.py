"""The real stores over a device that copies at the last moment marks allow, where memory that was given back holds NaN.

Compute is the CPU and works at once; copies wait until something waits for them. Whatever is given back (landing buffers, blocks of
host memory, staging slots, parts of files) is filled with ones, which is NaN in every float: a read that comes too early or too late
is a wrong gradient. What copies read is looked at twice, when they are asked for and when they run.
"""

from __future__ import annotations

import ctypes
import mmap
import weakref
from pathlib import Path

import numpy as np
from torch import Tensor

from efflaunch.memory.offload.allocator import Extent, Extents
from efflaunch.memory.offload.device import Mark
from efflaunch.memory.offload.file_blocks import DIRECT_BYTES, OffloadFile, WriteMeter
from efflaunch.memory.offload.file_store import FileStore
from efflaunch.memory.offload.host_pool import BLOCK_BYTES, HostArena
from efflaunch.memory.offload.host_store import ArenaStore, HostStore
from efflaunch.memory.offload.staging import Staging

from .fake import COMPUTE, IN, OUT, FakeDevice, FakeMark, Work

POISON = 0xFF


class LateDevice(FakeDevice):
    """Copies to the host and back when something waits for them; compute is what the CPU has done by then."""

    def __init__(self) -> None:
        super().__init__(eagerness={})
        self.num_copies = {OUT: 0, IN: 0}

    def mark(self) -> Mark:
        return FakeMark(self, COMPUTE, 0)

    def hold(self, mark: Mark) -> None:
        mark.synchronize()

    def _copy_of(self, source: Tensor, target: Tensor) -> Work:
        copy, going_out = super()._copy_of(source, target), target.untyped_storage().data_ptr() not in self._blocks
        then, now, alive = source.clone(), self.address(source), weakref.ref(source.untyped_storage())

        def work() -> None:
            if going_out:
                assert alive() is not None, "a source was let go of before its copy"
                assert np.array_equal(now, then.numpy()), "a source was written into before its copy"
            copy()
            self.num_copies[OUT if going_out else IN] += 1

        return work

    def address(self, tensor: Tensor) -> np.ndarray:
        if tensor.untyped_storage().data_ptr() in self._blocks:
            return super().address(tensor)
        # An array over the bytes themselves keeps no tensor alive.
        return np.ctypeslib.as_array((ctypes.c_uint8 * tensor.numel()).from_address(tensor.data_ptr()))

    def tensor(self, num_bytes: int, pool: str = COMPUTE) -> Tensor:
        tensor = super().tensor(num_bytes, pool)
        tensor.fill_(POISON)
        return tensor

    def _freed(self, pool: str, num_bytes: int, block: np.ndarray) -> None:
        block.fill(POISON)
        super()._freed(pool, num_bytes, block)


class PoisonedArena(HostArena):
    """Host memory whose free blocks hold NaN."""

    def give(self, extents: tuple[Extent, ...], num_bytes: int) -> None:  # type: ignore[override]
        for extent in extents:
            self.views([extent], extent.num_bytes)[0].fill_(POISON)
        super().give(extents, num_bytes)


class PoisonedStaging(Staging):
    """Slots that hold NaN when they are taken, whatever they held before."""

    def take(self, *, at_once: bool = False) -> Extent | None:
        slot = super().take(at_once=at_once)
        if slot is not None:
            self.tensor(slot, slot.num_bytes).fill_(POISON)
        return slot


class PoisonedFile(OffloadFile):
    """A file whose free parts hold NaN."""

    def __init__(self, directory: Path, capacity_bytes: int) -> None:
        super().__init__(directory, capacity_bytes)
        self._block = memoryview(mmap.mmap(-1, BLOCK_BYTES))
        self._block[:] = bytes([POISON]) * BLOCK_BYTES
        self.extents = _Spoiling([self.extents.capacity_bytes], self.extents.block_bytes, self)

    def spoil(self, extent: Extent) -> None:
        for offset in range(extent.start, extent.stop, BLOCK_BYTES):
            self.write(self._block, offset)


class _Spoiling(Extents):
    def __init__(self, regions: list[int], block_bytes: int, file: PoisonedFile) -> None:
        super().__init__(regions, block_bytes)
        self._file = file

    def give(self, extents: tuple[Extent, ...], num_bytes: int) -> None:  # type: ignore[override]
        for extent in extents:
            self._file.spoil(extent)
        super().give(extents, num_bytes)


def late_store(directory: Path | None, *, in_flight_bytes: int = 1 << 16, capacity_bytes: int = 64 << 20) -> HostStore:
    """A store in host memory, or in a file of the directory."""
    device = LateDevice()
    if directory is None:
        return ArenaStore(PoisonedArena(capacity_bytes, block_bytes=4096), device, in_flight_bytes)
    file = PoisonedFile(directory, capacity_bytes)
    slots = PoisonedStaging(PoisonedArena(8 * DIRECT_BYTES, block_bytes=DIRECT_BYTES))
    meter = WriteMeter(None, lambda measured, expected: None)
    return FileStore(file, slots, device, in_flight_bytes=in_flight_bytes, meter=meter)
