"""The device side of moving activations: three streams of work and the order between them. Here the protocol and the CPU's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

Pair = tuple[Tensor, Tensor]
"""(from, to): uint8 tensors of one length, one of them on the host."""


class Mark(Protocol):
    """A point in a stream of work, as torch.cuda.Event is one."""

    def query(self) -> bool:
        """Whether all work before it is done."""
        ...

    def synchronize(self) -> None:
        """Return once it is; the caller waits."""
        ...


class OffloadDevice(Protocol):
    """Three streams: compute, copies to the host, copies to the device. Each does its work in order; only marks order them.

    Nothing here keeps a tensor alive: who enqueues a copy sees to that (streams.py).
    """

    def mark(self) -> Mark:
        """After everything that compute has been given so far."""
        ...

    def hold(self, mark: Mark) -> None:
        """What compute is given from now on starts after the mark."""
        ...

    def to_host(self, pairs: Sequence[Pair], after: Sequence[Mark]) -> Mark:
        """Copy after the marks; the mark of its end."""
        ...

    def to_device(self, pairs: Sequence[Pair], after: Sequence[Mark]) -> Mark:
        """Copy after the marks; the mark of its end."""
        ...

    def landing(self, num_bytes: int) -> Tensor:
        """Device memory of the stream of copies to the device: once freed, that stream may use it again at once."""
        ...

    def hold_landings(self, mark: Mark) -> None:
        """What the stream of copies to the device is given from now on starts after the mark."""
        ...

    def stalls(self) -> tuple[int, float]:
        """(number, seconds) that compute stood still in `hold`, as far as known by now."""
        ...


class Past:
    """The mark of work that is done when the call that gave it returns."""

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        return None


class PlainDevice:
    """The CPU: copies are done at once, by the thread that asks for them."""

    def mark(self) -> Mark:
        return Past()

    def hold(self, mark: Mark) -> None:
        mark.synchronize()

    def to_host(self, pairs: Sequence[Pair], after: Sequence[Mark]) -> Mark:
        return _copy_now(pairs, after)

    def to_device(self, pairs: Sequence[Pair], after: Sequence[Mark]) -> Mark:
        return _copy_now(pairs, after)

    def landing(self, num_bytes: int) -> Tensor:
        return torch.empty(num_bytes, dtype=torch.uint8)

    def hold_landings(self, mark: Mark) -> None:
        mark.synchronize()

    def stalls(self) -> tuple[int, float]:
        return 0, 0.0


def _copy_now(pairs: Sequence[Pair], after: Sequence[Mark]) -> Mark:
    for mark in after:
        mark.synchronize()
    for source, target in pairs:
        target.copy_(source)
    return Past()
