"""Rows to the ranks that have their experts, and back: expert parallelism by one all-to-all each way, nothing padded or dropped.

Experts lie in equal runs over the ranks of a group, in order. Every rank of the group makes the same calls, with rows or without:
the executor cuts a micro-batch into as many pieces on all of them.

Legend: E experts, P ranks of the group, R rows here in the order of experts, Q rows that come here.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup


@dataclass(frozen=True, slots=True)
class ExpertRanks:
    """The ranks that share the experts of every layer with this one."""

    group: ProcessGroup
    size: int

    def exchange(self, counts: Tensor) -> RowExchange:
        """Agree on the rows of one piece. `counts` (E,): rows here for each expert. Collective."""
        sent = counts.view(self.size, -1)
        received = torch.empty_like(sent)
        dist.all_to_all_single(received, sent.contiguous(), group=self.group)
        return RowExchange(self.group, _sums(sent), _sums(received), received.sum(0), _by_expert(received))


@dataclass(frozen=True, slots=True)
class RowExchange:
    """The way of one piece's rows to their experts' ranks and back."""

    group: ProcessGroup
    sent: list[int]
    """Rows for each rank of the group."""
    received: list[int]
    """Rows from each rank."""
    counts: Tensor
    """Rows of each expert that is here (E / P,)."""
    order: Tensor
    """Where among the rows as they arrive each row in the order of experts is (Q,)."""

    def dispatch(self, rows: Tensor) -> Tensor:
        """Rows (R, ...) to the ranks of their experts: those that come here, in the order of experts (Q, ...). Collective."""
        return self._moved(rows, self.sent, self.received)[self.order]

    def combine(self, rows: Tensor) -> Tensor:
        """The way back of `dispatch`: (Q, ...) -> (R, ...). Collective."""
        arrived = torch.empty_like(rows)
        arrived[self.order] = rows
        return self._moved(arrived, self.received, self.sent)

    def _moved(self, rows: Tensor, sent: list[int], received: list[int]) -> Tensor:
        out = rows.new_empty((sum(received), *rows.shape[1:]))
        dist.all_to_all_single(out, rows.contiguous(), received, sent, group=self.group)
        return out


def _sums(counts: Tensor) -> list[int]:
    totals: list[int] = counts.sum(1).tolist()
    return totals


def _by_expert(received: Tensor) -> Tensor:
    """Order that brings rows from (rank, expert) to (expert, rank); `received` (P, E / P) counts them."""
    experts = torch.arange(received.shape[1], device=received.device).repeat(received.shape[0])
    return torch.argsort(torch.repeat_interleave(experts, received.flatten()), stable=True)
