"""A device that does its work when it likes: late, early or at random, as far as marks allow. Freed memory is used again at once.

Memory comes from one pool for each stream that allocates, last freed first used, as a GPU's caching allocator does; work
refers to addresses and keeps no tensor alive, as kernels do. So a copy from memory that was given away too early, or into
memory that is still read, shows as wrong numbers.
"""

from __future__ import annotations

import threading
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from random import Random

import numpy as np
import torch
from torch import Tensor

from efflaunch.memory.offload.device import Mark, Pair

COMPUTE, OUT, IN = "compute", "out", "in"
Work = Callable[[], None]


class FakeMark:
    def __init__(self, device: FakeDevice, stream: str, index: int) -> None:
        self.device, self.stream, self.index = device, stream, index

    def query(self) -> bool:
        return self.device.num_done[self.stream] >= self.index

    def synchronize(self) -> None:
        self.device.run_to(self.stream, self.index)


class FakeDevice:
    """eagerness: by stream, the chance that its next work is done at once; rest when something waits for it.

    faults: names of orders that it fails to keep, to see that tests notice: hold, hold_landings, out_after, in_after.
    """

    def __init__(self, *, eagerness: dict[str, float], seed: int = 0, faults: frozenset[str] = frozenset()) -> None:
        self.eagerness, self.faults = eagerness, faults
        self._random = Random(seed)
        self._lock = threading.RLock()
        self._work: dict[str, deque[Work | FakeMark]] = {stream: deque() for stream in (COMPUTE, OUT, IN)}
        self.num_done = dict.fromkeys(self._work, 0)
        self._num_given = dict.fromkeys(self._work, 0)
        self._blocks: dict[int, np.ndarray] = {}
        self._free: dict[tuple[str, int], list[np.ndarray]] = {}
        self.live_bytes = {COMPUTE: 0, IN: 0}

    # Memory.

    def tensor(self, num_bytes: int, pool: str = COMPUTE) -> Tensor:
        free = self._free.setdefault((pool, num_bytes), [])
        block = free.pop() if free else np.zeros(max(1, num_bytes), dtype=np.uint8)
        tensor = torch.from_numpy(block)[:num_bytes]
        self._blocks[block.ctypes.data] = block
        self.live_bytes[pool] += num_bytes
        weakref.finalize(tensor.untyped_storage(), self._freed, pool, num_bytes, block)
        return tensor

    def _freed(self, pool: str, num_bytes: int, block: np.ndarray) -> None:
        self._free[pool, num_bytes].append(block)
        self.live_bytes[pool] -= num_bytes

    def address(self, tensor: Tensor) -> np.ndarray:
        """The bytes behind a tensor, without a hold on it."""
        start = tensor.untyped_storage().data_ptr()
        block = self._blocks.get(start)
        if block is None:
            return tensor.numpy()  # host memory, which nobody frees
        offset = tensor.data_ptr() - start
        return block[offset : offset + tensor.numel() * tensor.element_size()]

    # Work.

    def compute(self, work: Work) -> None:
        self._give(COMPUTE, work)

    def _give(self, stream: str, *work: Work | FakeMark) -> FakeMark:
        with self._lock:
            self._work[stream].extend(work)
            self._num_given[stream] += len(work)
            mark = FakeMark(self, stream, self._num_given[stream])
            for each, chance in self.eagerness.items():
                while self._work[each] and self._random.random() < chance and self._is_ready(each):
                    self._do_next(each)
            return mark

    def _is_ready(self, stream: str) -> bool:
        head = self._work[stream][0]
        return not isinstance(head, FakeMark) or head.query()

    def _do_next(self, stream: str) -> None:
        head = self._work[stream].popleft()
        if isinstance(head, FakeMark):
            head.synchronize()
        else:
            head()
        self.num_done[stream] += 1

    def run_to(self, stream: str, index: int) -> None:
        with self._lock:
            while self.num_done[stream] < index:
                self._do_next(stream)

    def finish(self) -> None:
        for stream, index in self._num_given.items():
            self.run_to(stream, index)

    # The protocol.

    def mark(self) -> Mark:
        return self._give(COMPUTE)

    def hold(self, mark: Mark) -> None:
        assert isinstance(mark, FakeMark)
        if "hold" not in self.faults:
            self._give(COMPUTE, mark)

    def to_host(self, pairs: Sequence[Pair], after: Sequence[Mark]) -> Mark:
        return self._copy(OUT, pairs, [] if "out_after" in self.faults else after)

    def to_device(self, pairs: Sequence[Pair], after: Sequence[Mark]) -> Mark:
        return self._copy(IN, pairs, [] if "in_after" in self.faults else after)

    def _copy(self, stream: str, pairs: Sequence[Pair], after: Sequence[Mark]) -> Mark:
        marks = [mark for mark in after if isinstance(mark, FakeMark)]
        assert len(marks) == len(after)
        return self._give(stream, *marks, *(self._copy_of(source, target) for source, target in pairs))

    def _copy_of(self, source: Tensor, target: Tensor) -> Work:
        from_bytes, to_bytes = self.address(source), self.address(target)
        assert len(from_bytes) == len(to_bytes)

        def work() -> None:
            to_bytes[:] = from_bytes

        return work

    def landing(self, num_bytes: int) -> Tensor:
        return self.tensor(num_bytes, IN)

    def hold_landings(self, mark: Mark) -> None:
        assert isinstance(mark, FakeMark)
        if "hold_landings" not in self.faults:
            self._give(IN, mark)

    def stalls(self) -> tuple[int, float]:
        return 0, 0.0
