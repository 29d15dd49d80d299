"""Rows to the ranks that have their experts, and back: expert parallelism by one all-to-all each way, nothing padded or dropped.

Experts lie in equal runs over the ranks of a group, in order. Every rank of the group makes the same calls, with rows or without:
the executor cuts a micro-batch into as many pieces on all of them, and takes the chunks of a piece in one order (experts/layer_order.py).

Legend: E experts, P ranks of the group, S slots of an expert's rows, R rows here in the order of experts, Q rows that come here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from .experts.layer_order import PLAIN, LayerOrder

Arrival = Callable[[], Tensor]
"""Waits for rows that are on their way, and returns them."""


@dataclass(frozen=True, slots=True)
class ExpertRanks:
    """The ranks that share the experts of every layer with this one, and the order in which they take chunks of them."""

    group: ProcessGroup
    size: int
    order: LayerOrder = PLAIN

    def ordered(self, order: LayerOrder) -> ExpertRanks:
        """The same, whose exchanges are taken in this order."""
        return replace(self, order=order)

    def exchange(self, counts: Tensor) -> RowExchange:
        """Agree on the rows of one piece. `counts` (E,): rows here for each expert. Collective."""
        slots = self.order.slots(len(counts) // self.size)
        ends = counts.unsqueeze(1) * torch.arange(slots + 1, device=counts.device) // slots
        sent = ends.diff(dim=1).reshape(self.size, -1).contiguous()
        received = torch.empty_like(sent)
        dist.all_to_all_single(received, sent, group=self.group)
        # One wait for the device.
        sent_rows, received_rows = torch.stack([sent, received]).tolist()
        return RowExchange.of(self.group, self.order, SlotRows(sent_rows, received_rows, received, slots))


@dataclass(frozen=True, slots=True)
class SlotRows:
    """Rows sent and received by rank and slot, on the host (P lists of E / P x S) and, received, on the device."""

    sent: list[list[int]]
    received: list[list[int]]
    arriving: Tensor
    slots: int

    @property
    def width(self) -> int:
        """Slots of a rank's experts."""
        return len(self.sent[0])


@dataclass(frozen=True, slots=True)
class RowExchange:
    """The way of rows to their experts' ranks and back: of all rows of a piece, or of one chunk of them."""

    group: ProcessGroup
    order: LayerOrder
    """In which its chunks are taken."""
    rows: SlotRows
    cut: range
    """Slots of every rank that these rows belong to."""
    counts: Tensor
    """Rows of each expert that is here (E / P,)."""
    arrival_order: Tensor
    """Where among the rows as they arrive each row in the order of experts is (Q,)."""

    @classmethod
    def of(cls, group: ProcessGroup, order: LayerOrder, rows: SlotRows, cut: range | None = None) -> RowExchange:
        """The exchange of the rows of some slots; None: of all."""
        cut = cut or range(rows.width)
        arriving = rows.arriving[:, cut.start : cut.stop]
        totals = arriving.new_zeros(rows.width)
        totals[cut.start : cut.stop] = arriving.sum(0)
        return cls(group, order, rows, cut, totals.view(-1, rows.slots).sum(1), _by_slot(arriving))

    def chunks(self, degree: int) -> tuple[RowExchange, ...]:
        """The same rows in `degree` chunks: equal runs of each rank's slots. Not collective."""
        width = self.rows.width
        assert width % degree == 0, "slots are made for the degrees of the order"
        cuts = (range(width * chunk // degree, width * (chunk + 1) // degree) for chunk in range(degree))
        return tuple(RowExchange.of(self.group, self.order, self.rows, cut) for cut in cuts)

    @property
    def experts(self) -> slice:
        """Which of the experts that are here (E / P) these rows can be of."""
        return slice(self.cut.start // self.rows.slots, -(-self.cut.stop // self.rows.slots))

    @property
    def mine(self) -> Tensor:
        """Which of the piece's rows (R,) on this rank these are."""
        runs, start = [], 0
        for row in self.rows.sent:
            first = start + sum(row[: self.cut.start])
            runs.append(torch.arange(first, first + sum(row[self.cut.start : self.cut.stop]), device=self.counts.device))
            start += sum(row)
        return torch.cat(runs)

    @property
    def here(self) -> slice:
        """Where the rows that come here are among those of the whole piece that do, in the order of experts."""
        totals = [sum(column) for column in zip(*self.rows.received, strict=True)]
        start = sum(totals[: self.cut.start])
        return slice(start, start + sum(totals[self.cut.start : self.cut.stop]))

    def dispatch(self, rows: Tensor) -> Tensor:
        """Rows (R, ...) to the ranks of their experts: those that come here, in the order of experts (Q, ...). Collective."""
        return self.begin_dispatch(rows)()

    def combine(self, rows: Tensor) -> Tensor:
        """The way back of `dispatch`: (Q, ...) -> (R, ...). Collective."""
        return self.begin_combine(rows)()

    def begin_dispatch(self, rows: Tensor) -> Arrival:
        """`dispatch` that runs beside what follows, until its rows are asked for. Collective."""
        return self._begin(rows.contiguous(), self.rows.sent, self.rows.received, self.arrival_order)

    def begin_combine(self, rows: Tensor) -> Arrival:
        """`combine` that runs beside what follows, until its rows are asked for. Collective."""
        arrived = torch.empty_like(rows, memory_format=torch.contiguous_format)
        arrived[self.arrival_order] = rows
        return self._begin(arrived, self.rows.received, self.rows.sent)

    def _begin(self, rows: Tensor, sent: list[list[int]], received: list[list[int]], order: Tensor | None = None) -> Arrival:
        leaving, coming = ([sum(row[self.cut.start : self.cut.stop]) for row in matrix] for matrix in (sent, received))
        out = rows.new_empty((sum(coming), *rows.shape[1:]))
        work = dist.all_to_all_single(out, rows, coming, leaving, group=self.group, async_op=True)
        return _Travelling(work, rows, out, order)


@dataclass(slots=True)
class _Travelling:
    """Rows that are on their way; those that leave stay in memory until the others are there."""

    work: Any
    leaving: Tensor | None
    coming: Tensor
    order: Tensor | None

    def __call__(self) -> Tensor:
        self.work.wait()
        self.leaving = None
        return self.coming if self.order is None else self.coming[self.order]


def _by_slot(received: Tensor) -> Tensor:
    """Order that brings rows from (rank, slot) to (slot, rank); `received` (P, slots) counts them."""
    slots = torch.arange(received.shape[1], device=received.device).repeat(received.shape[0])
    return torch.argsort(torch.repeat_interleave(slots, received.flatten()), stable=True)
