"""Sends activations to the next stage and gradients back, without waiting, and receives those of its neighbours ahead of their use.

Note: what meets what. Both sides know from the step's plan how many rows this place of a stage has in each micro-batch, so every
buffer has its size before anything is sent, and micro-batches without rows here are not sent at all. Messages between two ranks come
in the order of the receiver's passes: activations on one communicator, gradients on another.

Note: why nothing waits for ever. A receive is posted one message ahead of its use, and a rank waits for its own sends only where its
partner has a receive posted or is bound to come to it: for activations when their gradient has come, for gradients when two more
are on their way.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from .place import SENDS_UNDER_WAY, StagePlace


@dataclass(slots=True)
class _Message:
    """A tensor on its way, and what it is."""

    work: dist.Work
    rows: Tensor
    what: str


class _Inbox:
    """The messages of one step from one neighbour, in order; the next one is always under way."""

    def __init__(self, links: StageLinks, group: dist.ProcessGroup, source: int, kind: str, sizes: Iterable[tuple[int, int]]) -> None:
        self._links, self._group, self._source, self._kind = links, group, source, kind
        self._sizes = iter([(number, rows) for number, rows in sizes if rows])
        self._next: tuple[int, _Message] | None = None
        self._post()

    def _post(self) -> None:
        following = next(self._sizes, None)
        if following is None:
            self._next = None
            return
        number, rows = following
        what = f"receiving {self._kind} of micro-batch {number} from rank {self._source}"
        buffer = self._links.empty(rows)
        with naming(what):
            work = dist.irecv(buffer, self._source, group=self._group, tag=number)
        assert work is not None, "this rank is in the group"
        self._next = number, _Message(work, buffer, what)

    def take(self, number: int, rows: int) -> Tensor:
        """The rows of a micro-batch, once they are here."""
        if not rows:
            return self._links.empty(0)
        assert self._next is not None and self._next[0] == number, f"{self._kind} of micro-batch {number} out of order"
        message = self._next[1]
        self._links.wait(message)
        self._post()
        return message.rows


class StageLinks:
    """What one rank sends to its partners in the stages before and behind, and receives from them."""

    def __init__(self, place: StagePlace, hidden_size: int, dtype: torch.dtype, device: torch.device, at: Callable[[str], None]) -> None:
        """Open them; messages are (T, `hidden_size`) of `dtype`. `at` is called with which one a rank waits for."""
        self.place = place
        self._hidden_size, self._dtype, self._device, self._at = hidden_size, dtype, device, at
        self._activations: _Inbox | None = None
        self._gradients: _Inbox | None = None
        self._sent: dict[int, _Message] = {}
        self._sent_back: deque[_Message] = deque()

    def begin(self, forward: Iterable[tuple[int, int]], backward: Iterable[tuple[int, int]] = ()) -> None:
        """Start a step's receives: (micro-batch, rows here) in the order of this rank's forward and backward passes."""
        ranks, index = self.place.ranks, self.place.index
        if not self.place.is_first:
            self._activations = _Inbox(self, ranks.forward, ranks.ranks[index - 1], "activations", forward)
        if not self.place.is_last:
            self._gradients = _Inbox(self, ranks.backward, ranks.ranks[index + 1], "gradients", backward)

    def empty(self, rows: int) -> Tensor:
        """A buffer (rows, hidden size) for what one stage sends to another."""
        return torch.empty(rows, self._hidden_size, dtype=self._dtype, device=self._device)

    def activations(self, number: int, rows: int) -> Tensor:
        """Wait for the activations (rows, M) of a micro-batch, from the stage before."""
        assert self._activations is not None
        return self._activations.take(number, rows)

    def gradients(self, number: int, rows: int) -> Tensor:
        """Wait for the gradients (rows, M) of a micro-batch's activations, from the stage behind."""
        assert self._gradients is not None
        gradients = self._gradients.take(number, rows)
        if number in self._sent:
            self.wait(self._sent.pop(number))
        return gradients

    def send_activations(self, number: int, rows: Tensor) -> None:
        """Send a micro-batch's activations on; they must stay as they are until their gradients have come."""
        if len(rows):
            self._sent[number] = self._send(self.place.ranks.forward, self.place.index + 1, "activations", number, rows)

    def let_go(self) -> None:
        """Wait for the oldest activations sent, where no backward follows that would, but for a few."""
        while len(self._sent) > SENDS_UNDER_WAY:
            self.wait(self._sent.pop(next(iter(self._sent))))

    def send_gradients(self, number: int, rows: Tensor) -> None:
        """Send the gradients of what was received back; nobody may change them any more."""
        if not len(rows):
            return
        self._sent_back.append(self._send(self.place.ranks.backward, self.place.index - 1, "gradients", number, rows))
        while len(self._sent_back) > SENDS_UNDER_WAY:
            self.wait(self._sent_back.popleft())

    def _send(self, group: dist.ProcessGroup, stage: int, kind: str, number: int, rows: Tensor) -> _Message:
        target, rows = self.place.ranks.ranks[stage], rows.contiguous()
        what = f"sending {kind} of micro-batch {number} to rank {target}"
        with naming(what):
            work = dist.isend(rows, target, group=group, tag=number)
        assert work is not None, "this rank is in the group"
        return _Message(work, rows, what)

    def finish(self) -> None:
        """Wait until all that was sent in the step is on the other side."""
        for message in (*self._sent.values(), *self._sent_back):
            self.wait(message)
        self.forget()

    def forget(self) -> None:
        """Start anew after an exception: what was under way is nobody's."""
        self._activations = self._gradients = None
        self._sent.clear()
        self._sent_back.clear()

    def wait(self, message: _Message) -> None:
        """Wait for one message, saying so where anybody asks."""
        self._at(message.what)
        with naming(message.what):
            message.work.wait()


@contextmanager
def naming(what: str) -> Iterator[None]:
    """Errors of the transport inside say what was under way: RuntimeError."""
    try:
        yield
    except RuntimeError as error:
        raise RuntimeError(f"{what}: {error}") from error
