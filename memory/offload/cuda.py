"""CUDA's side of moving activations: two streams beside compute, events between them, memory pinned in place."""

from __future__ import annotations

import resource
from collections import deque
from collections.abc import Sequence

import torch
from torch import Tensor

from ...errors import ConfigError
from ...units import format_bytes
from .device import Mark, Pair

STALL_MS = 0.05
"""Shorter than this is the cost of the two events themselves."""


class CudaDevice:
    """Compute is whatever stream is current where the store is called: the same one in forward and in backward's thread."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._out, self._in = torch.cuda.Stream(device), torch.cuda.Stream(device)
        self._compute: torch.cuda.Stream | None = None
        self._holds: deque[tuple[torch.cuda.Event, torch.cuda.Event]] = deque()
        self._stalls, self._stalled_s = 0, 0.0

    def _current(self) -> torch.cuda.Stream:
        current = torch.cuda.current_stream(self.device)
        if self._compute is None:
            self._compute = current
        assert current == self._compute, "a store serves one compute stream: memory is reused in its order"
        return current

    def mark(self) -> Mark:
        return self._current().record_event()

    def hold(self, mark: Mark) -> None:
        stream = self._current()
        before, after = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        before.record(stream)
        stream.wait_event(_event(mark))
        after.record(stream)
        self._holds.append((before, after))
        self._count_stalls()

    def to_host(self, pairs: Sequence[Pair], after: Sequence[Mark]) -> Mark:
        return _copy(self._out, pairs, after)

    def to_device(self, pairs: Sequence[Pair], after: Sequence[Mark]) -> Mark:
        return _copy(self._in, pairs, after)

    def landing(self, num_bytes: int) -> Tensor:
        with torch.cuda.stream(self._in):
            return torch.empty(num_bytes, dtype=torch.uint8, device=self.device)

    def hold_landings(self, mark: Mark) -> None:
        self._in.wait_event(_event(mark))

    def stalls(self) -> tuple[int, float]:
        self._count_stalls()
        return self._stalls, self._stalled_s

    def _count_stalls(self) -> None:
        while self._holds and self._holds[0][1].query():
            before, after = self._holds.popleft()
            stalled_ms = before.elapsed_time(after)
            if stalled_ms > STALL_MS:
                self._stalls += 1
                self._stalled_s += stalled_ms / 1000


def _copy(stream: torch.cuda.Stream, pairs: Sequence[Pair], after: Sequence[Mark]) -> Mark:
    for mark in after:
        stream.wait_event(_event(mark))
    with torch.cuda.stream(stream):
        for source, target in pairs:
            target.copy_(source, non_blocking=True)
    return stream.record_event()


def _event(mark: Mark) -> torch.cuda.Event:
    assert isinstance(mark, torch.cuda.Event)
    return mark


class CudaPinner:
    """Registers host memory with the driver, for all devices of the process.

    The driver does not count such memory against RLIMIT_MEMLOCK (mlock does), so a low limit is no error by itself; where
    pinning fails the message names it all the same, for kernels and sandboxes that do count it. One call may not cover
    512 GiB (vLLM issue 51080): arenas come in smaller slabs.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def register(self, address: int, num_bytes: int) -> None:
        with torch.cuda.device(self.device):
            code = torch.cuda.cudart().cudaHostRegister(address, num_bytes, 1)  # 1: portable
        if int(code) != 0:
            limit = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
            unlimited = limit == resource.RLIM_INFINITY
            raise ConfigError(
                "memory.host_budget",
                found=f"CUDA cannot pin {format_bytes(num_bytes)} of host memory (error {int(code)}; ulimit -l is "
                f"{'unlimited' if unlimited else format_bytes(limit)})",
                expected="host memory that the GPU can copy from by itself",
                hint="a smaller memory.host_budget" + ("" if unlimited else ", or `ulimit -l unlimited` before the launch"),
            )

    def unregister(self, address: int) -> None:
        code = torch.cuda.cudart().cudaHostUnregister(address)
        assert int(code) == 0, f"cudaHostUnregister: error {int(code)}"
