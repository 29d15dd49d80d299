"""What torch's CUDA caching allocator would reserve for a trace: simulated on one stream, not measured on a GPU.

The rules are those of c10/cuda/CUDACachingAllocator (constants kMinBlockSize, kSmallSize, kSmallBuffer, kLargeBuffer,
kMinLargeAlloc, kRoundLarge): sizes round up to 512 bytes; up to 1 MiB come from a small pool of 2 MiB segments, others from
segments of 20 MiB or, from 10 MiB up, of their own size rounded to 2 MiB; the smallest free block that is large enough is taken
and split; free neighbours merge. With expandable segments each pool is one segment that grows at its end.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from dataclasses import dataclass, field

from .trace import Trace, round_up

MIB = 1 << 20
BLOCK, SMALL, SMALL_SEGMENT, LARGE_SEGMENT, OWN_SEGMENT, ROUND = 512, MIB, 2 * MIB, 20 * MIB, 10 * MIB, 2 * MIB
STRIDE = 1 << 60
"""Address distance of segments: they never touch."""


def reserved_bytes(trace: Trace, *, expandable: bool, steps: int = 2) -> int:
    """Peak bytes reserved while the trace runs `steps` times; what outlives one run goes before the next."""
    pools = {small: _Pool(small, expandable) for small in (True, False)}
    peak = 0
    for _ in range(steps):
        placed: dict[int, tuple[bool, int]] = {}
        for index, is_birth in _in_time(trace):
            if is_birth:
                size = round_up(trace.sizes[index], BLOCK)
                small = size <= SMALL
                placed[index] = small, pools[small].take(size)
                peak = max(peak, sum(pool.reserved for pool in pools.values()))
            else:
                small, address = placed.pop(index)
                pools[small].give_back(address)
    return peak


def _in_time(trace: Trace) -> list[tuple[int, bool]]:
    """(allocation, whether it begins), ends before beginnings at equal times."""
    events = [(time, True, index) for index, time in enumerate(trace.births)]
    events += [(time, False, index) for index, time in enumerate(trace.deaths)]
    return [(index, is_birth) for _, is_birth, index in sorted(events)]


@dataclass(slots=True)
class _Block:
    size: int
    free: bool
    before: int | None
    after: int | None


@dataclass(slots=True)
class _Pool:
    small: bool
    expandable: bool
    reserved: int = 0
    blocks: dict[int, _Block] = field(default_factory=dict)
    free: list[tuple[int, int]] = field(default_factory=list)
    """(size, address), ascending."""
    segments: int = 0
    last: int | None = None
    """The block at the end of the expandable segment."""

    def take(self, size: int) -> int:
        place = bisect_left(self.free, (size, -1))
        new = self._grow if self.expandable else self._segment
        address = self.free.pop(place)[1] if place < len(self.free) else new(size)
        block = self.blocks[address]
        block.free = False
        if block.size - size >= BLOCK if self.small or self.expandable else block.size - size > SMALL:
            self._split(address, size)
        return address

    def give_back(self, address: int) -> None:
        block = self.blocks[address]
        if block.after is not None and self.blocks[block.after].free:
            self._merge(address, block.after)
        if block.before is not None and self.blocks[block.before].free:
            before = block.before
            self.free.remove((self.blocks[before].size, before))
            self._join(before, address)
            address, block = before, self.blocks[before]
        block.free = True
        insort(self.free, (block.size, address))

    def _segment(self, size: int) -> int:
        large = LARGE_SEGMENT if size < OWN_SEGMENT else round_up(size, ROUND)
        whole = SMALL_SEGMENT if self.small else large
        address = self.segments * STRIDE
        self.segments += 1
        self.reserved += whole
        self.blocks[address] = _Block(whole, True, None, None)
        return address

    def _grow(self, size: int) -> int:
        """Map more at the end of the one segment; a free block there counts."""
        page = SMALL_SEGMENT if self.small else LARGE_SEGMENT
        last = self.last
        if last is not None and self.blocks[last].free:
            block = self.blocks[last]
            self.free.remove((block.size, last))
            more = round_up(size - block.size, page)
            block.size += more
            self.reserved += more
            return last
        more = round_up(size, page)
        address = 0 if last is None else last + self.blocks[last].size
        self.blocks[address] = _Block(more, True, last, None)
        if last is not None:
            self.blocks[last].after = address
        self.last = address
        self.reserved += more
        return address

    def _split(self, address: int, size: int) -> None:
        block = self.blocks[address]
        rest = address + size
        self.blocks[rest] = _Block(block.size - size, True, address, block.after)
        if block.after is not None:
            self.blocks[block.after].before = rest
        if self.last == address:
            self.last = rest
        block.size, block.after = size, rest
        insort(self.free, (self.blocks[rest].size, rest))

    def _merge(self, address: int, after: int) -> None:
        """Take a free block into the one before it."""
        self.free.remove((self.blocks[after].size, after))
        self._join(address, after)

    def _join(self, address: int, after: int) -> None:
        block, gone = self.blocks[address], self.blocks.pop(after)
        block.size += gone.size
        block.after = gone.after
        if gone.after is not None:
            self.blocks[gone.after].before = address
        if self.last == after:
            self.last = address
