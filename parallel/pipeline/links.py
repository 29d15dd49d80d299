"""Sends activations to the next stage and gradients back, without waiting, and receives those of its neighbours ahead of their use.

Note: what meets what. Both sides know from the step's plan how many rows this place of a stage has in each micro-batch, so every
buffer has its size before anything is sent, and micro-batches without rows here are not sent at all. The receives from a neighbour are
posted in the order of its sends (pipeline_plan.py); activations go by one communicator, gradients by another.

Note: why nothing waits for ever. Receives are posted ahead of their use, so far that even sends which wait for their receive would not
hang (step_actions.py proves it). A rank waits for its own sends only to free their memory: for activations when their gradient has
come, for gradients when two more are on their way.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from .pipeline_plan import Unit, UnitKind
from .place import SENDS_UNDER_WAY, StagePlace


@dataclass(slots=True)
class _Message:
    """A tensor on its way, and what it is."""

    work: dist.Work
    rows: Tensor
    what: str


class StageLinks:
    """What one rank sends to its partners in the stages before and behind, and receives from them."""

    def __init__(self, place: StagePlace, hidden_size: int, dtype: torch.dtype, device: torch.device, at: Callable[[str], None]) -> None:
        """Open them; messages are (T, `hidden_size`) of `dtype`. `at` is called with which one a rank waits for."""
        self.place = place
        self._hidden_size, self._dtype, self._device, self._at = hidden_size, dtype, device, at
        self._posted: dict[Unit, _Message] = {}
        self._sent: dict[Unit, _Message] = {}
        self._sent_back: deque[_Message] = deque()

    def empty(self, rows: int) -> Tensor:
        """A buffer (rows, hidden size) for what one stage sends to another."""
        return torch.empty(rows, self._hidden_size, dtype=self._dtype, device=self._device)

    def post(self, unit: Unit, peer: int, rows: int) -> None:
        """Start to receive what `unit` makes on pipeline rank `peer`: (rows, M)."""
        if not rows:
            return
        source, buffer = self.place.ranks.ranks[peer], self.empty(rows)
        what = f"receiving {_kind(unit)} of micro-batch {unit.micro_batch} from stage {unit.stage} on rank {source}"
        with naming(what):
            work = dist.irecv(buffer, source, group=self._group(unit), tag=self._tag(unit))
        assert work is not None, "this rank is in the group"
        self._posted[unit] = _Message(work, buffer, what)

    def take(self, unit: Unit, rows: int) -> Tensor:
        """Wait for what `unit` made (rows, M); its receive is posted."""
        if not rows:
            return self.empty(0)
        message = self._posted.pop(unit)
        self._wait(message)
        return message.rows

    def send(self, unit: Unit, peer: int, rows: Tensor) -> None:
        """Send what `unit` made to pipeline rank `peer`. Activations stay as they are until `release`, gradients for good."""
        if not len(rows):
            return
        target, rows = self.place.ranks.ranks[peer], rows.contiguous()
        what = f"sending {_kind(unit)} of micro-batch {unit.micro_batch} from stage {unit.stage} to rank {target}"
        with naming(what):
            work = dist.isend(rows, target, group=self._group(unit), tag=self._tag(unit))
        assert work is not None, "this rank is in the group"
        if unit.kind is UnitKind.FORWARD:
            self._sent[unit] = _Message(work, rows, what)
            return
        self._sent_back.append(_Message(work, rows, what))
        while len(self._sent_back) > SENDS_UNDER_WAY:
            self._wait(self._sent_back.popleft())

    def release(self, unit: Unit) -> None:
        """Wait until the activations that `unit` made are on the other side, where they were sent: their gradient has come back."""
        if unit in self._sent:
            self._wait(self._sent.pop(unit))

    def release_oldest(self) -> None:
        """Wait for the oldest activations sent, but for a few: where no backward follows, nothing else does."""
        while len(self._sent) > SENDS_UNDER_WAY:
            self._wait(self._sent.pop(next(iter(self._sent))))

    def finish(self) -> None:
        """Wait until all that was sent in the step is on the other side."""
        for message in (*self._sent.values(), *self._sent_back):
            self._wait(message)
        self.forget()

    def forget(self) -> None:
        """Start anew after an exception: what was under way is nobody's."""
        self._posted.clear()
        self._sent.clear()
        self._sent_back.clear()

    def _group(self, unit: Unit) -> dist.ProcessGroup:
        return self.place.ranks.forward if unit.kind is UnitKind.FORWARD else self.place.ranks.backward

    def _tag(self, unit: Unit) -> int:
        return unit.micro_batch * self.place.num_stages + unit.stage

    def _wait(self, message: _Message) -> None:
        self._at(message.what)
        with naming(message.what):
            message.work.wait()


def _kind(unit: Unit) -> str:
    return "activations" if unit.kind is UnitKind.FORWARD else "gradients"


@contextmanager
def naming(what: str) -> Iterator[None]:
    """Errors of the transport inside say what was under way: RuntimeError."""
    try:
        yield
    except RuntimeError as error:
        raise RuntimeError(f"{what}: {error}") from error
