"""One micro-batch's attention on this rank: Ulysses inside, ring across, any document boundaries.

The memory executor calls exchange_in -> core_forward -> exchange_out, and the mirror image in backward; between the
exchanges every tensor has all tokens of this ring member and the local heads.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor

from ..topology import Topology
from .attention import AttentionSpec, BlockKernel, attention_backward, attention_backward_into, attention_forward
from .blocks import Calls, attention_blocks, join_documents, split_keys
from .clock import BusyClock
from .layout import GroupLayout, cut_slices
from .plan import Group
from .ring import Ring, ring_backward, ring_forward
from .sinks import join_sinks, sink_gradient
from .ulysses import UlyssesExchange

QKV = tuple[Tensor, Tensor, Tensor]
Rows = tuple[tuple[int, int], ...]
"""Rows [start, stop) of each Ulysses rank of a ring member, as it holds them outside attention."""


@dataclass(frozen=True)
class SequenceAttention:
    """Executes attention for one group of a micro-batch. Collective inside the group: every member makes the same calls."""

    topology: Topology
    kernel: BlockKernel
    group: Group | None
    """None: this rank has no work in the micro-batch, and every tensor has zero rows."""
    layout: GroupLayout | None
    clock: BusyClock
    """How long the group is busy."""
    _blocks: dict[int | None, tuple[Calls, ...]]
    _chunk_blocks: dict[tuple[int | None, Rows, int], Calls]
    rank_tokens: tuple[int, ...] | None = None
    """Tokens of every rank of the stage, where layers exchange rows beyond the group."""

    @property
    def stage_rank(self) -> int:
        return self.topology.stage_rank

    @property
    def member(self) -> int:
        return 0 if self.group is None else self.topology.stage_rank - self.group.first_rank

    def busy(self) -> AbstractContextManager[None]:
        return self.clock.running()

    def exchange_in(self, q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec) -> QKV:
        """(T, heads, D) of this rank -> (T of the ring member, local heads, D)."""
        exchange = self._exchange(spec)
        return (q, k, v) if exchange is None else exchange.gather_tokens(q, k, v)

    def exchange_out(self, o: Tensor, spec: AttentionSpec) -> Tensor:
        exchange = self._exchange(spec)
        return o if exchange is None else exchange.scatter_tokens(o)

    def exchange_out_backward(self, do: Tensor, spec: AttentionSpec) -> Tensor:
        exchange = self._exchange(spec)
        return do if exchange is None else exchange.gather_output(do)

    def exchange_in_backward(self, gradients: QKV, spec: AttentionSpec, dtype: torch.dtype) -> QKV:
        """Gradients leave in the dtype of the activations: what they are added to has no more digits."""
        dq, dk, dv = (t.to(dtype) for t in gradients)
        exchange = self._exchange(spec)
        return (dq, dk, dv) if exchange is None else exchange.scatter_gradients(dq, dk, dv)

    def core_forward(self, qkv: QKV, spec: AttentionSpec, sinks: Tensor | None) -> tuple[Tensor, Tensor]:
        """o and lse between the exchanges. `sinks`: a logit of each query head of `spec`, on all ranks, that joins the softmax."""
        blocks = self._blocks_for(spec.window)
        if self.group is None or self.group.ring == 1:
            o, lse = attention_forward(*qkv, blocks[0], spec, self.kernel)
        else:
            o, lse = ring_forward(*qkv, self._ring(self.group), blocks, self._ring_tokens(), spec, self.kernel)
        return self._joined(o, lse, sinks)

    def core_backward(self, do: Tensor, qkv: QKV, o: Tensor, lse: Tensor, spec: AttentionSpec) -> QKV:
        blocks = self._blocks_for(spec.window)
        if self.group is None or self.group.ring == 1:
            return attention_backward(do, *qkv, o, lse, blocks[0], spec, self.kernel)
        return ring_backward(do, (*qkv, o, lse), self._ring(self.group), blocks, self._ring_tokens(), spec, self.kernel)

    @property
    def ring(self) -> int:
        """Ranks across which keys travel; chunks of queries are for 1."""
        return 1 if self.group is None else self.group.ring

    @property
    def member_tokens(self) -> tuple[int, ...]:
        """Tokens of every Ulysses rank of this ring member outside attention; this rank's at `ulysses_index`."""
        if self.group is None or self.layout is None:
            return (0,)
        return tuple(self.layout.num_tokens(self._first_member + i) for i in range(self.group.ulysses))

    @property
    def ulysses_index(self) -> int:
        return self.member - self._first_member

    @property
    def _first_member(self) -> int:
        """The first Ulysses rank of this rank's ring member."""
        return 0 if self.group is None else self.member // self.group.ulysses * self.group.ulysses

    def exchange_keys(self, k: Tensor, v: Tensor, spec: AttentionSpec) -> tuple[Tensor, Tensor]:
        """exchange_in of keys and values alone."""
        exchange = self._exchange(spec)
        return (k, v) if exchange is None else exchange.gather_keys(k, v)

    def exchange_keys_backward(self, dk: Tensor, dv: Tensor, spec: AttentionSpec, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        dk, dv = dk.to(dtype), dv.to(dtype)
        exchange = self._exchange(spec)
        return (dk, dv) if exchange is None else exchange.scatter_keys(dk, dv)

    def gather_rows(self, t: Tensor, rows: Rows, spec: AttentionSpec) -> Tensor:
        """Gathers the `rows` of each member: (rows of mine, all query heads, D) -> (rows of all members, local heads, D)."""
        exchange = self._exchange(spec, rows)
        return t if exchange is None else exchange.gather_output(t)

    def scatter_rows(self, t: Tensor, rows: Rows, spec: AttentionSpec) -> Tensor:
        """The way back of gather_rows."""
        exchange = self._exchange(spec, rows)
        return t if exchange is None else exchange.scatter_tokens(t)

    def rows_forward(self, q: Tensor, k: Tensor, v: Tensor, rows: Rows, spec: AttentionSpec, sinks: Tensor | None) -> tuple[Tensor, Tensor]:
        """o and lse of gathered query rows against all gathered keys; no ring. `sinks` as in `core_forward`."""
        return self._joined(*attention_forward(q, k, v, self._blocks_of_rows(rows, spec.window), spec, self.kernel), sinks)

    def rows_backward(
        self, do: Tensor, qkv: QKV, o: Tensor, lse: Tensor, rows: Rows, spec: AttentionSpec, totals: tuple[Tensor, Tensor], key_block: int
    ) -> Tensor:
        """dq of gathered query rows; their part of dk and dv is added to `totals`, made for at most `key_block` keys at a time."""
        blocks = self._blocks_of_rows(rows, spec.window, key_block)
        return attention_backward_into(do, qkv, o, lse, blocks, spec, self.kernel, totals)

    def sinks_backward(self, do: Tensor, o: Tensor, lse: Tensor, sinks: Tensor) -> Tensor:
        """Gradient (H,) of `sinks` from what is between the exchanges here; 0 for the heads of other ranks."""
        gradient, mine = lse.new_zeros(sinks.shape), self._local_heads(len(sinks))
        gradient[mine] = sink_gradient(do, o, lse, sinks[mine])
        return gradient

    def _joined(self, o: Tensor, lse: Tensor, sinks: Tensor | None) -> tuple[Tensor, Tensor]:
        if sinks is not None:
            join_sinks(o, lse, sinks[self._local_heads(len(sinks))])
        return o, lse

    def _local_heads(self, num_heads: int) -> slice:
        """The query heads of this rank between the exchanges: the ranks of a ring member have equal runs of them, in order."""
        run = num_heads // (1 if self.group is None else self.group.ulysses)
        return slice(self.ulysses_index * run, (self.ulysses_index + 1) * run)

    def _exchange(self, spec: AttentionSpec, rows: Rows | None = None) -> UlyssesExchange | None:
        if self.group is None or self.layout is None or self.group.ulysses == 1:
            return None
        tokens = self.member_tokens if rows is None else [stop - start for start, stop in rows]
        communicator = self.topology.group(self.group.first_rank + self._first_member, self.group.ulysses)
        return UlyssesExchange(communicator, tokens, self.ulysses_index, spec, self.clock.waiting)

    def _blocks_of_rows(self, rows: Rows, window: int | None, key_block: int = 0) -> Calls:
        """Blocks of each member's `rows` against all keys; with `key_block`, cut so that no block has more keys."""
        key = window, rows, key_block
        if key not in self._chunk_blocks:
            if self.layout is None:
                self._chunk_blocks[key] = ()
            else:
                members = self.layout.member_slices[self._first_member : self._first_member + len(rows)]
                queries = tuple(p for member, (a, b) in zip(members, rows, strict=True) for p in cut_slices(member, a, b))
                blocks = attention_blocks(queries, self.layout.ring_slices[self._first_member // len(rows)], window)
                blocks = split_keys(blocks, key_block, window) if key_block else blocks
                self._chunk_blocks[key] = join_documents(blocks, key_block or None, self.kernel.pads)
        return self._chunk_blocks[key]

    def _ring(self, group: Group) -> Ring:
        index, inner = divmod(self.member, group.ulysses)
        members = [i * group.ulysses + inner for i in range(group.ring)]
        return Ring(self.topology.group(group.first_rank, group.degree), members, index, self.clock.waiting)

    def _ring_tokens(self) -> Sequence[int]:
        assert self.layout is not None
        return [sum(len(piece) for piece in slices) for slices in self.layout.ring_slices]

    def _blocks_for(self, window: int | None) -> tuple[Calls, ...]:
        """Per ring member: my queries against its keys. Made once per window and micro-batch."""
        if window not in self._blocks:
            if self.layout is None or self.group is None:
                self._blocks[window] = ((),)
            else:
                mine = self.layout.ring_slices[self.member // self.group.ulysses]
                blocks = (attention_blocks(mine, theirs, window) for theirs in self.layout.ring_slices)
                self._blocks[window] = tuple(join_documents(each, pads=self.kernel.pads) for each in blocks)
        return self._blocks[window]


def sequence_attention(
    topology: Topology,
    kernel: BlockKernel,
    group: Group | None,
    layout: GroupLayout | None,
    clock: BusyClock,
    rank_tokens: tuple[int, ...] | None = None,
) -> SequenceAttention:
    """The attention of `group` (None: no work) with its layout, timed by `clock`; `rank_tokens` as the field."""
    return SequenceAttention(topology, kernel, group, layout, clock, {}, {}, rank_tokens)
