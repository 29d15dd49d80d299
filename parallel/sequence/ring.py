"""Ring attention: keys and values travel round the ring, and in backward their gradients travel with them.

Every member holds its zigzag slices of each sequence (layout.py), so causal work is equal. Partial outputs are merged by
log-sum-exp in float32; key/value gradients travel in float32 (Ring Attention, 2310.01889; zigzag: Llama 3, 2407.21783, sec. 3.3.2).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.distributed as dist
from torch import Tensor

from .attention import AttentionSpec, BlockKernel, Partial, accumulation_dtype, add_blocks, attention_backward
from .blocks import Calls


class Ring:
    """Neighbour exchange among `members` of `group` (their ranks in it, in ring order), this rank at `index` of them.

    `waiting`: entered around what waits for the neighbours (BusyClock.waiting).
    """

    def __init__(
        self,
        group: dist.ProcessGroup | None,
        members: Sequence[int],
        index: int,
        waiting: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        self._group, self.size, self.index, self._waiting = group, len(members), index, waiting
        self._next, self._previous = members[(index + 1) % len(members)], members[index - 1]
        self._pending: list[dist.Work] = []

    def visitor(self, step: int) -> int:
        """Ring index whose keys are here after `step` hops."""
        return (self.index - step) % self.size

    def start(self, outgoing: Tensor, incoming: Tensor) -> None:
        """Post one hop: send `outgoing` on, receive into `incoming`; both must live until `wait`. Empty tensors are not sent."""
        operations = []
        if outgoing.numel():
            operations.append(dist.P2POp(dist.isend, outgoing, group=self._group, group_peer=self._next))
        if incoming.numel():
            operations.append(dist.P2POp(dist.irecv, incoming, group=self._group, group_peer=self._previous))
        self._pending += dist.batch_isend_irecv(operations) if operations else []

    def wait(self) -> None:
        with self._waiting():
            for work in self._pending:
                work.wait()
        self._pending = []


def ring_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    ring: Ring,
    blocks: Sequence[Calls],
    num_tokens: Sequence[int],
    spec: AttentionSpec,
    kernel: BlockKernel,
) -> tuple[Tensor, Tensor]:
    """o (T, H, D), lse (T, H). `blocks[j]`: my queries against ring member j's keys, of which there are `num_tokens[j]`."""
    partial = Partial(q, merges=True)
    here = torch.stack((k, v))
    for step in range(ring.size):
        coming = None
        if step + 1 < ring.size:
            coming = here.new_empty((2, num_tokens[ring.visitor(step + 1)], *here.shape[2:]))
            ring.start(here, coming)
        add_blocks(partial, q, here[0], here[1], blocks[ring.visitor(step)], spec, kernel)
        ring.wait()
        here = coming if coming is not None else here
    return partial.result()


def ring_backward(
    do: Tensor,
    saved: tuple[Tensor, Tensor, Tensor, Tensor, Tensor],
    ring: Ring,
    blocks: Sequence[Calls],
    num_tokens: Sequence[int],
    spec: AttentionSpec,
    kernel: BlockKernel,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv in the accumulation dtype; `saved` is (q, k, v, o, lse). The last hop brings each gradient home."""
    q, k, v, o, lse = saved
    wide = accumulation_dtype(q.dtype)
    here, gradient = torch.stack((k, v)), None
    dq = torch.zeros_like(q, dtype=wide)
    for step in range(ring.size):
        visitor, coming = ring.visitor(step), None
        arriving = here.new_empty(here.shape, dtype=wide) if gradient is not None else None
        if gradient is not None and arriving is not None:
            ring.start(gradient, arriving)
        if step + 1 < ring.size:
            coming = here.new_empty((2, num_tokens[ring.visitor(step + 1)], *here.shape[2:]))
            ring.start(here, coming)
        part_q, part_k, part_v = attention_backward(do, q, here[0], here[1], o, lse, blocks[visitor], spec, kernel)
        dq += part_q
        mine = torch.stack((part_k, part_v)).to(wide)
        ring.wait()
        gradient = mine if arriving is None else arriving.add_(mine)
        here = coming if coming is not None else here
    assert gradient is not None, "a ring has at least one member"
    home = gradient.new_empty((2, *k.shape))
    ring.start(gradient, home)
    ring.wait()
    return dq, home[0], home[1]
