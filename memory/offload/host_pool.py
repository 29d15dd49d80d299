"""Host memory taken once and cut into blocks: pinned, where a GPU copies into it, exactly as many bytes as were asked for.

torch's own pinned allocator rounds every request up to a power of two, which wastes up to half of it; here the memory is a
plain mapping that is registered with CUDA afterwards (cudaHostRegister), slab by slab, before the first step.
"""

from __future__ import annotations

import mmap
from bisect import bisect_right
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from ...errors import ConfigError, PlanError
from ...units import format_bytes
from ...utils.pages import PIECE_BYTES, advise_huge_pages, touch
from .allocator import Extent, Extents

BLOCK_BYTES = 64 << 10
"""The least that is handed out. Large parcels come in few runs of many blocks, so this only bounds what ends of blocks waste."""
SLAB_BYTES = PIECE_BYTES
"""What is mapped, and pinned, at a time; no extent crosses from one slab into the next."""


class Pinner(Protocol):
    """Makes memory one that a GPU copies to and from by itself."""

    def register(self, address: int, num_bytes: int) -> None: ...

    def unregister(self, address: int) -> None: ...


class HostArena:
    """`capacity_bytes` of host memory, rounded up to whole blocks.

    Without a pinner memory is the system's plain one, and takes room only as it is first written.
    """

    def __init__(
        self, capacity_bytes: int, *, block_bytes: int = BLOCK_BYTES, slab_bytes: int = SLAB_BYTES, pinner: Pinner | None = None
    ) -> None:
        """ConfigError if the system does not give so much, or does not let it be pinned."""
        total = -(-capacity_bytes // block_bytes) * block_bytes
        slab_bytes = max(block_bytes, slab_bytes // block_bytes * block_bytes)
        sizes = [min(slab_bytes, total - start) for start in range(0, total, slab_bytes)]
        self.extents = Extents(sizes, block_bytes)
        self._starts = [sum(sizes[:i]) for i in range(len(sizes))]
        self._pinner = pinner
        self._maps: list[mmap.mmap] = []
        self._slabs: list[Tensor] = []
        self._pinned: list[int] = []
        try:
            for size in sizes:
                self._add_slab(size)
        except BaseException:
            self.close()
            raise

    def _add_slab(self, size: int) -> None:
        try:
            memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        except OSError as error:
            raise _no_memory(self.extents.capacity_bytes, f"{format_bytes(size)} refused by the system ({error.strerror})") from error
        slab = torch.frombuffer(memory, dtype=torch.uint8)
        self._maps.append(memory)
        self._slabs.append(slab)
        if self._pinner is not None:
            # A child process must not get copies of pinned pages: the GPU would go on writing to the other ones.
            memory.madvise(mmap.MADV_DONTFORK)
            advise_huge_pages(memory)
            touch(slab)
            self._pinner.register(slab.data_ptr(), size)
            self._pinned.append(slab.data_ptr())

    def take(self, num_bytes: int) -> tuple[Extent, ...]:
        """PlanError if less is free: the plan was made for a smaller step."""
        extents = self.extents.take(num_bytes)
        if extents is None:
            raise exhausted("memory.host_budget", num_bytes, self.extents, "a larger memory.host_budget, memory.offload_dir=DIRECTORY")
        return extents

    def give(self, extents: Sequence[Extent], num_bytes: int) -> None:
        self.extents.give(extents, num_bytes)

    def views(self, extents: Sequence[Extent], num_bytes: int) -> list[Tensor]:
        """The first `num_bytes` of the extents: uint8 tensors over the arena's own memory, one an extent."""
        views = []
        for extent in extents:
            length = min(extent.num_bytes, num_bytes)
            slab = bisect_right(self._starts, extent.start) - 1
            start = extent.start - self._starts[slab]
            views.append(self._slabs[slab][start : start + length])
            num_bytes -= length
        assert num_bytes == 0, "the extents hold it all"
        return views

    def buffer(self, extent: Extent) -> memoryview:
        """The extent's memory for reads and writes of files; aligned as the extent is, and at most to a page."""
        slab = bisect_right(self._starts, extent.start) - 1
        start = extent.start - self._starts[slab]
        return memoryview(self._maps[slab])[start : start + extent.num_bytes]

    def owns(self, address: int) -> bool:
        """Whether a storage that starts there is one of the slabs: host memory, whatever device the tensors around it are on."""
        return any(slab.data_ptr() <= address < slab.data_ptr() + slab.numel() for slab in self._slabs)

    def close(self) -> None:
        """Unpin and forget; memory goes back once no tensor looks at it any more."""
        while self._pinned:
            assert self._pinner is not None
            self._pinner.unregister(self._pinned.pop())
        self._slabs.clear()
        self._maps.clear()


def exhausted(where: str, num_bytes: int, space: Extents, larger: str) -> PlanError:
    """The error of a step that moves more than was planned for."""
    return PlanError(
        where,
        found=f"{format_bytes(num_bytes)} to move with {format_bytes(space.used_bytes)} of this rank's "
        f"{format_bytes(space.capacity_bytes)} in use",
        expected="room for everything the memory policy moves",
        hint=f"{larger}, a smaller memory.host_fraction, or memory.segment_layers=2 (fewer layer inputs)",
    )


def _no_memory(capacity_bytes: int, found: str) -> ConfigError:
    return ConfigError(
        "memory.host_budget",
        found=found,
        expected=f"{format_bytes(capacity_bytes)} of host memory for this rank",
        hint="a smaller memory.host_budget, memory.segment_layers=2, or memory.offload_dir=DIRECTORY on a local disk",
    )
