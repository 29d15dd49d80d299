"""One micro-batch's attention on this rank: Ulysses inside, ring across, any document boundaries.

The memory executor calls exchange_in -> core_forward -> exchange_out, and the mirror image in backward; between the
exchanges every tensor has all tokens of this ring member and the local heads.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

from torch import Tensor

from ..topology import Topology
from .attention import AttentionSpec, BlockKernel, attention_backward, attention_forward
from .blocks import Blocks, attention_blocks
from .clock import BusyClock
from .layout import GroupLayout
from .plan import Group
from .ring import Ring, ring_backward, ring_forward
from .ulysses import UlyssesExchange

QKV = tuple[Tensor, Tensor, Tensor]


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
    _blocks: dict[int | None, tuple[Blocks, ...]]

    @property
    def member(self) -> int:
        return 0 if self.group is None else self.topology.rank - self.group.first_rank

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

    def exchange_in_backward(self, gradients: QKV, spec: AttentionSpec, dtype: object) -> QKV:
        """Gradients leave in the dtype of the activations: what they are added to has no more digits."""
        dq, dk, dv = (t.to(dtype) for t in gradients)  # type: ignore[call-overload]
        exchange = self._exchange(spec)
        return (dq, dk, dv) if exchange is None else exchange.scatter_gradients(dq, dk, dv)

    def core_forward(self, qkv: QKV, spec: AttentionSpec) -> tuple[Tensor, Tensor]:
        """o and lse between the exchanges."""
        blocks = self._blocks_for(spec.window)
        if self.group is None or self.group.ring == 1:
            return attention_forward(*qkv, blocks[0], spec, self.kernel)
        return ring_forward(*qkv, self._ring(self.group), blocks, self._ring_tokens(), spec, self.kernel)

    def core_backward(self, do: Tensor, qkv: QKV, o: Tensor, lse: Tensor, spec: AttentionSpec) -> QKV:
        blocks = self._blocks_for(spec.window)
        if self.group is None or self.group.ring == 1:
            return attention_backward(do, *qkv, o, lse, blocks[0], spec, self.kernel)
        return ring_backward(do, (*qkv, o, lse), self._ring(self.group), blocks, self._ring_tokens(), spec, self.kernel)

    def _exchange(self, spec: AttentionSpec) -> UlyssesExchange | None:
        if self.group is None or self.layout is None or self.group.ulysses == 1:
            return None
        ulysses, first = self.group.ulysses, self.member // self.group.ulysses * self.group.ulysses
        tokens = [self.layout.num_tokens(first + i) for i in range(ulysses)]
        communicator = self.topology.group(self.group.first_rank + first, ulysses)
        return UlyssesExchange(communicator, tokens, self.member - first, spec)

    def _ring(self, group: Group) -> Ring:
        index, inner = divmod(self.member, group.ulysses)
        ranks = [group.first_rank + i * group.ulysses + inner for i in range(group.ring)]
        return Ring(self.topology.group(group.first_rank, group.degree), ranks, index)

    def _ring_tokens(self) -> Sequence[int]:
        assert self.layout is not None
        return [sum(len(piece) for piece in slices) for slices in self.layout.ring_slices]

    def _blocks_for(self, window: int | None) -> tuple[Blocks, ...]:
        """Per ring member: my queries against its keys. Made once per window and micro-batch."""
        if window not in self._blocks:
            if self.layout is None or self.group is None:
                self._blocks[window] = ((),)
            else:
                mine = self.layout.ring_slices[self.member // self.group.ulysses]
                self._blocks[window] = tuple(attention_blocks(mine, theirs, window) for theirs in self.layout.ring_slices)
        return self._blocks[window]


def sequence_attention(
    topology: Topology, kernel: BlockKernel, group: Group | None, layout: GroupLayout | None, clock: BusyClock
) -> SequenceAttention:
    """The attention of `group` (None: no work) with its layout, timed by `clock`."""
    return SequenceAttention(topology, kernel, group, layout, clock, {})
