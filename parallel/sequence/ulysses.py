"""Ulysses exchange: a slice of the tokens with all heads <-> all tokens with a slice of the heads (DeepSpeed-Ulysses, 2309.14509).

Token counts per rank may differ; nothing is padded. Query heads must divide over the ranks. A rank gets exactly the
key/value heads its query heads read: where ranks outnumber key/value heads, heads are replicated, and their gradients summed back.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from .attention import AttentionSpec, accumulation_dtype


@dataclass(frozen=True, slots=True)
class HeadSplit:
    """Which heads each of `degree` ranks works on. All ranks have the same number of each kind."""

    degree: int
    num_heads: int
    num_kv_heads: int
    kv_of_rank: tuple[tuple[int, ...], ...]
    """Per rank: the global key/value head behind each of its local ones."""

    @property
    def local(self) -> tuple[int, int]:
        """Local query heads and local key/value heads."""
        return self.num_heads // self.degree, len(self.kv_of_rank[0])

    @property
    def copies(self) -> tuple[int, ...]:
        """How many times each key/value head is held; copies of one head lie next to each other, for ranks follow the heads."""
        held = Counter(head for heads in self.kv_of_rank for head in heads)
        return tuple(held[head] for head in range(self.num_kv_heads))

    @property
    def identity(self) -> bool:
        return [head for heads in self.kv_of_rank for head in heads] == list(range(self.num_kv_heads))


def split_heads(num_heads: int, num_kv_heads: int, degree: int) -> HeadSplit:
    """Query heads in equal runs; key/value heads follow. Where a run reads key/value heads unevenly, each query head gets its own copy."""
    if num_heads % degree:
        raise ValueError(f"{num_heads} query heads do not divide over {degree} ranks")
    run, share = num_heads // degree, num_heads // num_kv_heads
    needed = [[head // share for head in range(rank * run, (rank + 1) * run)] for rank in range(degree)]
    unique = [tuple(dict.fromkeys(heads)) for heads in needed]
    regular = len({len(heads) for heads in unique}) == 1 and all(
        [head for head in heads for _ in range(run // len(heads))] == want for heads, want in zip(unique, needed, strict=True)
    )
    return HeadSplit(degree, num_heads, num_kv_heads, tuple(unique) if regular else tuple(tuple(heads) for heads in needed))


class UlyssesExchange:
    """The two all-to-alls of one Ulysses group; `num_tokens[i]` is what member i holds outside attention.

    `waiting`: entered around what waits for the other members (BusyClock.waiting).
    """

    def __init__(
        self,
        group: dist.ProcessGroup | None,
        num_tokens: Sequence[int],
        member: int,
        spec: AttentionSpec,
        waiting: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        self._group, self._num_tokens, self._mine, self._waiting = group, list(num_tokens), num_tokens[member], waiting
        self._split = split_heads(spec.num_heads, spec.num_kv_heads, len(num_tokens))

    def gather_tokens(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(T_mine, all heads, D) x 3 -> (T_all, local heads, D) x 3. One all-to-all."""
        degree = self._split.degree
        if degree == 1:
            return q, k, v
        k, v = self._replicate(k), self._replicate(v)
        parts = [t.unflatten(1, (degree, -1)) for t in (q, k, v)]
        heads, kv_heads = self._split.local
        return tuple(self._all_to_all_heads(torch.cat(parts, 2)).split([heads, kv_heads, kv_heads], 1))  # type: ignore[return-value]

    def gather_keys(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """gather_tokens of keys and values alone: (T_mine, K, D) x 2 -> (T_all, local key/value heads, D) x 2."""
        if self._split.degree == 1:
            return k, v
        parts = [self._replicate(t).unflatten(1, (self._split.degree, -1)) for t in (k, v)]
        k, v = self._all_to_all_heads(torch.cat(parts, 2)).chunk(2, 1)
        return k, v

    def scatter_tokens(self, o: Tensor) -> Tensor:
        """(T_all, local heads, D) -> (T_mine, all heads, D). One all-to-all."""
        return o if self._split.degree == 1 else self._all_to_all_tokens(o).flatten(1, 2)

    def gather_output(self, do: Tensor) -> Tensor:
        """The backward of scatter_tokens: (T_mine, all heads, D) -> (T_all, local heads, D)."""
        return do if self._split.degree == 1 else self._all_to_all_heads(do.unflatten(1, (self._split.degree, -1)))

    def scatter_gradients(self, dq: Tensor, dk: Tensor, dv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The backward of gather_tokens; gradients of replicated heads are summed. One all-to-all."""
        if self._split.degree == 1:
            return dq, dk, dv
        heads, kv_heads = self._split.local
        back = self._all_to_all_tokens(torch.cat((dq, dk, dv), 1)).split([heads, kv_heads, kv_heads], 2)
        return back[0].flatten(1, 2), self._sum_replicas(back[1]), self._sum_replicas(back[2])

    def scatter_keys(self, dk: Tensor, dv: Tensor) -> tuple[Tensor, Tensor]:
        """The backward of gather_keys."""
        if self._split.degree == 1:
            return dk, dv
        back = self._all_to_all_tokens(torch.cat((dk, dv), 1)).chunk(2, 2)
        return self._sum_replicas(back[0]), self._sum_replicas(back[1])

    def _replicate(self, t: Tensor) -> Tensor:
        """(T, kv heads, D) -> (T, degree x local kv heads, D): each head as often as ranks need it."""
        if self._split.identity:
            return t
        copies = self._split.copies
        if len(set(copies)) == 1:
            return t.unsqueeze(2).expand(-1, -1, copies[0], -1).flatten(1, 2)
        return torch.cat([t[:, head : head + 1].expand(-1, count, -1) for head, count in enumerate(copies)], 1)

    def _sum_replicas(self, t: Tensor) -> Tensor:
        """(T, degree, local kv heads, D) -> (T, kv heads, D)."""
        flat, wide = t.flatten(1, 2), accumulation_dtype(t.dtype)
        if self._split.identity:
            return flat
        copies = self._split.copies
        if len(set(copies)) == 1:
            return flat.unflatten(1, (-1, copies[0])).sum(2, dtype=wide).to(t.dtype)
        return torch.cat([part.sum(1, keepdim=True, dtype=wide) for part in flat.split(list(copies), 1)], 1).to(t.dtype)

    def _all_to_all_heads(self, t: Tensor) -> Tensor:
        """(T_mine, degree, h, D) -> (T_all, h, D)."""
        send = t.transpose(0, 1).contiguous()
        h, dim = send.shape[2:]
        received = send.new_empty((sum(self._num_tokens), h, dim))
        sizes = [count * h * dim for count in self._num_tokens]
        with self._waiting():
            dist.all_to_all_single(received.view(-1), send.view(-1), sizes, [self._mine * h * dim] * self._split.degree, group=self._group)
        return received

    def _all_to_all_tokens(self, t: Tensor) -> Tensor:
        """(T_all, h, D) -> (T_mine, degree, h, D)."""
        send = t.contiguous()
        h, dim = send.shape[1:]
        received = send.new_empty((self._split.degree, self._mine, h, dim))
        sizes = [count * h * dim for count in self._num_tokens]
        with self._waiting():
            dist.all_to_all_single(received.view(-1), send.view(-1), [self._mine * h * dim] * self._split.degree, sizes, group=self._group)
        return received.transpose(0, 1)
