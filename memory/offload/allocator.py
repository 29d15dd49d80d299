"""Who owns which bytes of a fixed space, in blocks of one size. Pure: memory and files are cut by the same rules."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, order=True)
class Extent:
    """Bytes [start, start + num_bytes) of a space; whole blocks."""

    start: int
    num_bytes: int

    @property
    def stop(self) -> int:
        return self.start + self.num_bytes


class Extents:
    """A space of one or more regions, handed out in extents that never cross from one region into the next.

    A request takes the tightest free run that holds it; where none does it takes several runs, so nothing is ever lost to
    fragmentation: whatever is free can be had. What is lost is the unused end of each request's last block.
    """

    def __init__(self, regions: Sequence[int], block_bytes: int) -> None:
        """regions: their sizes in bytes, one after the other; block_bytes: a power of two that divides each of them."""
        assert block_bytes > 0 and block_bytes & (block_bytes - 1) == 0, "blocks are powers of two"
        assert all(size % block_bytes == 0 for size in regions), "regions are whole blocks"
        self.block_bytes = block_bytes
        self.capacity_bytes = sum(regions)
        self.used_bytes = self.asked_bytes = self.high_water_bytes = 0
        starts = [sum(regions[:i]) for i in range(len(regions))]
        self._borders = frozenset(starts)
        self._free = [Extent(start, size) for start, size in zip(starts, regions, strict=True) if size]

    @property
    def free_bytes(self) -> int:
        return self.capacity_bytes - self.used_bytes

    @property
    def waste_bytes(self) -> int:
        """Ends of blocks that hold nothing."""
        return self.used_bytes - self.asked_bytes

    def blocks_for(self, num_bytes: int) -> int:
        """Bytes of the whole blocks that hold so many."""
        return -(-num_bytes // self.block_bytes) * self.block_bytes

    def take(self, num_bytes: int) -> tuple[Extent, ...] | None:
        """Extents of `num_bytes` together, rounded up to whole blocks; None, and nothing taken, if there is not so much free."""
        wanted = self.blocks_for(num_bytes)
        if wanted > self.free_bytes:
            return None
        taken = tuple(self._pick(wanted))
        self.used_bytes += wanted
        self.asked_bytes += num_bytes
        self.high_water_bytes = max(self.high_water_bytes, self.used_bytes)
        return taken

    def _pick(self, wanted: int) -> Iterable[Extent]:
        while wanted:
            fitting = [run for run in self._free if run.num_bytes >= wanted]
            run = min(fitting, key=lambda run: run.num_bytes) if fitting else max(self._free, key=lambda run: run.num_bytes)
            self._free.remove(run)
            piece = Extent(run.start, min(wanted, run.num_bytes))
            if run.num_bytes > piece.num_bytes:
                insort(self._free, Extent(piece.stop, run.num_bytes - piece.num_bytes))
            wanted -= piece.num_bytes
            yield piece

    def give(self, extents: Iterable[Extent], num_bytes: int) -> None:
        """Take back what `take(num_bytes)` returned."""
        for extent in extents:
            self._put_back(extent)
            self.used_bytes -= extent.num_bytes
        self.asked_bytes -= num_bytes

    def _put_back(self, extent: Extent) -> None:
        at = bisect_left(self._free, extent)
        before = self._free[at - 1] if at else None
        after = self._free[at] if at < len(self._free) else None
        assert (before is None or before.stop <= extent.start) and (after is None or extent.stop <= after.start), "given back twice"
        start, stop = extent.start, extent.stop
        if after is not None and after.start == stop and stop not in self._borders:
            stop = after.stop
            del self._free[at]
        if before is not None and before.stop == start and start not in self._borders:
            start = before.start
            del self._free[at - 1]
        insort(self._free, Extent(start, stop - start))
