"""What must stay alive until when, while activations move: the sources of copies to the host, the buffers copies come back into.

Note: order and life.
A source may be freed, and its memory written again by compute, only after its copy: it is held here until the copy's mark has
passed, or until compute itself has been made to wait for that mark. A landing buffer belongs to the stream of copies to the
device: it is given back to that stream only behind a mark of compute's last use of it. So memory that is reused is always
reused in the order of some stream, which is what torch's allocator needs, and nothing depends on when the host looks:
`record_stream` would delay every release until then. (The hazards: torchrec issue 4231, DeepEP issue 455, TRL issue 5700.)
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .device import Mark, OffloadDevice, Pair


@dataclass(frozen=True, slots=True)
class Leaving:
    """A copy to the host that may not be done, and what it reads."""

    source: Tensor
    mark: Mark
    num_bytes: int


class Transfers:
    """Copies both ways through one device, from one thread at a time; all of them on behalf of the same compute stream."""

    def __init__(self, device: OffloadDevice, in_flight_bytes: int) -> None:
        """in_flight_bytes: sources of copies not known to be done hold at most so much, or one copy, whichever is more."""
        self.device = device
        self.in_flight_bytes = in_flight_bytes
        self._leaving: deque[Leaving] = deque()

    def send(self, source: Tensor, targets: Sequence[Tensor]) -> Mark:
        """Start copying `source` (flat uint8, as compute leaves it now) into the targets one after the other."""
        mark = self.device.to_host(list(pairs_of(source, targets)), [self.device.mark()])
        self._leaving.append(Leaving(source, mark, source.numel()))
        self._let_go()
        return mark

    def _let_go(self) -> None:
        while self._leaving and self._leaving[0].mark.query():
            self._leaving.popleft()
        in_flight = sum(copy.num_bytes for copy in self._leaving)
        while len(self._leaving) > 1 and in_flight > self.in_flight_bytes:
            oldest = self._leaving.popleft()
            # Compute waits, not the host: only compute can write to that memory again.
            self.device.hold(oldest.mark)
            in_flight -= oldest.num_bytes

    def bring(self, sources: Sequence[Tensor], target: Tensor, after: Sequence[Mark]) -> Mark:
        """Start copying the sources one after the other into `target` (flat uint8, a landing buffer)."""
        return self.device.to_device([(host, part) for part, host in pairs_of(target, sources)], after)

    def release(self, landing: Tensor) -> None:
        """Compute has been given all its uses of the buffer: whoever drops the last reference to it may do so from now on."""
        del landing
        self.device.hold_landings(self.device.mark())

    def drain(self) -> None:
        """Wait for all copies to the host and forget their sources."""
        for copy in self._leaving:
            copy.mark.synchronize()
        self._leaving.clear()


def pairs_of(whole: Tensor, parts: Sequence[Tensor]) -> Iterator[Pair]:
    """(piece of whole, part) for parts that are as long together."""
    start = 0
    for part in parts:
        yield whole[start : start + part.numel()], part
        start += part.numel()
    assert start == whole.numel(), "the parts are as long as the whole"


def flat_bytes(rows: Tensor) -> Tensor:
    """All of `rows` as one row of bytes; a copy only if it is not contiguous."""
    return rows.detach().contiguous().view(-1).view(torch.uint8)
