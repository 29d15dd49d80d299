"""The attention core: blocks in, output and log-sum-exp out, forward and backward. The only operation across tokens.

Legend: T query rows, S key rows, H query heads, K key/value heads (H a multiple of K), D head dim.
q (T, H, D); k, v (S, K, D); o (T, H, D); lse (T, H). Partial results of several blocks are merged by log-sum-exp in
float32 (float64 for float64 inputs); backward of each block uses the merged o and lse (FlashAttention-2, 2307.08691, sec. 3.1).
Rows that no block covers get o = 0 and lse = -inf.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from .blocks import Block, Calls, Documents, disjoint_queries

MASKED_QUERY_CHUNK = 512
"""Query rows whose scores exist at one time in the masked path: peak is this x keys x heads."""


@dataclass(frozen=True, slots=True)
class AttentionSpec:
    """One layer's attention. `window`: keys with query - key < window; `softcap`: scores become cap * tanh(score / cap)."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    scale: float
    window: int | None = None
    softcap: float | None = None


class BlockKernel(Protocol):
    """One block of attention on one device. Inputs are row slices of the tensors in the legend."""

    @property
    def pads(self) -> int:
        """Rows that the workspace of a call has more for each of its documents."""
        ...

    def forward(self, q: Tensor, k: Tensor, v: Tensor, block: Block, spec: AttentionSpec) -> tuple[Tensor, Tensor]:
        """o (T, H, D) in q's dtype, lse (T, H) in the accumulation dtype."""

    def backward(
        self, do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, block: Block, spec: AttentionSpec
    ) -> tuple[Tensor, Tensor, Tensor]:
        """dq, dk, dv of this block alone, given the o and lse merged over all blocks."""

    def forward_documents(self, q: Tensor, k: Tensor, v: Tensor, documents: Documents, spec: AttentionSpec) -> tuple[Tensor, Tensor]:
        """o and lse of several documents, each seeing itself alone; rows as `documents` has them."""

    def backward_documents(
        self, do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, documents: Documents, spec: AttentionSpec
    ) -> tuple[Tensor, Tensor, Tensor]:
        """dq, dk, dv of several documents, given the o and lse merged over all blocks."""


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """What partial results of `dtype` are summed in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


class Partial:
    """Output and log-sum-exp merged so far over the blocks of all key shards that have visited."""

    def __init__(self, q: Tensor, *, merges: bool) -> None:
        wide = accumulation_dtype(q.dtype)
        self.dtype = q.dtype
        self.out = q.new_zeros(q.shape, dtype=wide if merges else q.dtype)
        self.lse = q.new_full(q.shape[:2], float("-inf"), dtype=wide)

    def add(self, rows: slice, out: Tensor, lse: Tensor) -> None:
        """Merge one block's result into its rows (streaming softmax: weights exp(lse - merged))."""
        if self.out.dtype != accumulation_dtype(self.dtype):
            self.out[rows], self.lse[rows] = out, lse
            return
        old = self.lse[rows]
        merged = torch.logaddexp(old, lse)
        # A row that sees no key yet has lse -inf on both sides: its weights are 0, not nan.
        shift = torch.where(merged == float("-inf"), torch.zeros_like(merged), merged)
        self.out[rows] = self.out[rows] * (old - shift).exp().unsqueeze(-1) + out * (lse - shift).exp().unsqueeze(-1)
        self.lse[rows] = merged

    def result(self) -> tuple[Tensor, Tensor]:
        return self.out.to(self.dtype), self.lse


def add_blocks(partial: Partial, q: Tensor, k: Tensor, v: Tensor, blocks: Calls, spec: AttentionSpec, kernel: BlockKernel) -> None:
    """Run `blocks` of q against this shard of keys and merge them into `partial`."""
    for block in blocks:
        rows, keys = slice(block.q_start, block.q_stop), slice(block.k_start, block.k_stop)
        partial.add(rows, *_forward(q[rows], k[keys], v[keys], block, spec, kernel))


def _forward(q: Tensor, k: Tensor, v: Tensor, call: Block | Documents, spec: AttentionSpec, kernel: BlockKernel) -> tuple[Tensor, Tensor]:
    if isinstance(call, Documents):
        return kernel.forward_documents(q, k, v, call, spec)
    return kernel.forward(q, k, v, call, spec)


def _backward(
    rows: tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor], call: Block | Documents, spec: AttentionSpec, kernel: BlockKernel
) -> tuple[Tensor, Tensor, Tensor]:
    """`rows`: do, q, k, v, o and lse."""
    if isinstance(call, Documents):
        return kernel.backward_documents(*rows, call, spec)
    return kernel.backward(*rows, call, spec)


def attention_forward(q: Tensor, k: Tensor, v: Tensor, blocks: Calls, spec: AttentionSpec, kernel: BlockKernel) -> tuple[Tensor, Tensor]:
    """o and lse over one shard of keys."""
    if len(blocks) == 1 and _whole(blocks[0], q, k):
        return _forward(q, k, v, blocks[0], spec, kernel)
    partial = Partial(q, merges=not disjoint_queries(blocks))
    add_blocks(partial, q, k, v, blocks, spec, kernel)
    return partial.result()


def attention_backward(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, blocks: Calls, spec: AttentionSpec, kernel: BlockKernel
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv over one shard of keys, in the accumulation dtype (in q's own where no row is touched twice)."""
    if len(blocks) == 1 and _whole(blocks[0], q, k):
        return _backward((do, q, k, v, o, lse), blocks[0], spec, kernel)
    wide = accumulation_dtype(q.dtype)
    single = len(blocks) == 1 or (disjoint_queries(blocks) and _disjoint_keys(blocks))
    dq, dk, dv = (torch.zeros_like(t, dtype=t.dtype if single else wide) for t in (q, k, v))
    for block in blocks:
        rows, keys = slice(block.q_start, block.q_stop), slice(block.k_start, block.k_stop)
        grads = _backward((do[rows], q[rows], k[keys], v[keys], o[rows], lse[rows]), block, spec, kernel)
        for total, part, where in zip((dq, dk, dv), grads, (rows, keys, keys), strict=True):
            if single:
                total[where] = part
            else:
                total[where] += part
    return dq, dk, dv


def attention_backward_into(
    do: Tensor,
    qkv: tuple[Tensor, Tensor, Tensor],
    o: Tensor,
    lse: Tensor,
    blocks: Calls,
    spec: AttentionSpec,
    kernel: BlockKernel,
    totals: tuple[Tensor, Tensor],
) -> Tensor:
    """dq in the accumulation dtype; dk and dv of the blocks are added to `totals`, which have a row per key of qkv."""
    q, k, v = qkv
    dq = torch.zeros_like(q, dtype=accumulation_dtype(q.dtype))
    for block in blocks:
        rows, keys = slice(block.q_start, block.q_stop), slice(block.k_start, block.k_stop)
        part, dk, dv = _backward((do[rows], q[rows], k[keys], v[keys], o[rows], lse[rows]), block, spec, kernel)
        dq[rows] += part
        totals[0][keys] += dk
        totals[1][keys] += dv
    return dq


def _whole(block: Block | Documents, q: Tensor, k: Tensor) -> bool:
    """Whether one block covers every row, so that its results are the results."""
    return (block.q_start, block.q_stop, block.k_start, block.k_stop) == (0, q.shape[0], 0, k.shape[0])


def _disjoint_keys(blocks: Calls) -> bool:
    ranges = sorted((block.k_start, block.k_stop) for block in blocks)
    return all(a[1] <= b[0] for a, b in zip(ranges, ranges[1:], strict=False))


class EachDocument(ABC):
    """Documents one after the other, for kernels that take one document a call: what comes out is what one call gives."""

    pads = 0

    @abstractmethod
    def forward(self, q: Tensor, k: Tensor, v: Tensor, block: Block, spec: AttentionSpec) -> tuple[Tensor, Tensor]:
        """Implements `BlockKernel.forward`."""

    @abstractmethod
    def backward(
        self, do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, block: Block, spec: AttentionSpec
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Implements `BlockKernel.backward`."""

    def forward_documents(self, q: Tensor, k: Tensor, v: Tensor, documents: Documents, spec: AttentionSpec) -> tuple[Tensor, Tensor]:
        """Implements `BlockKernel.forward_documents`."""
        out, lse = torch.empty_like(q), q.new_empty(q.shape[:2], dtype=accumulation_dtype(q.dtype))
        for block in documents.each(spec.window):
            rows = slice(block.q_start, block.q_stop)
            out[rows], lse[rows] = self.forward(q[rows], k[rows], v[rows], block, spec)
        return out, lse

    def backward_documents(
        self, do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, documents: Documents, spec: AttentionSpec
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Implements `BlockKernel.backward_documents`."""
        dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        for block in documents.each(spec.window):
            rows = slice(block.q_start, block.q_stop)
            parts = self.backward(do[rows], q[rows], k[rows], v[rows], o[rows], lse[rows], block, spec)
            dq[rows], dk[rows], dv[rows] = parts
        return dq, dk, dv


class MaskedKernel(EachDocument):
    """Any mask and softcap in plain torch, by query chunks: exact everywhere, slower than flash."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, block: Block, spec: AttentionSpec) -> tuple[Tensor, Tensor]:
        wide = accumulation_dtype(q.dtype)
        out, lse = torch.empty_like(q), q.new_empty(q.shape[:2], dtype=wide)
        for a, b, ka, kb in _query_chunks(q.shape[0], k.shape[0], block, spec.window):
            scores, _ = self._scores(q[a:b], k[ka:kb], a, ka, block, spec)
            part = scores.logsumexp(-1)
            weights = (scores - torch.where(part == float("-inf"), 0.0, part).unsqueeze(-1)).exp()
            out[a:b] = torch.einsum("kgts,skd->tkgd", weights, v[ka:kb].to(wide)).flatten(1, 2)
            lse[a:b] = part.flatten(0, 1).T
        return out, lse

    def backward(
        self, do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, block: Block, spec: AttentionSpec
    ) -> tuple[Tensor, Tensor, Tensor]:
        wide = accumulation_dtype(q.dtype)
        dq, dk, dv = torch.empty_like(q), torch.zeros_like(k, dtype=wide), torch.zeros_like(v, dtype=wide)
        delta = (do.to(wide) * o.to(wide)).sum(-1)
        for a, b, ka, kb in _query_chunks(q.shape[0], k.shape[0], block, spec.window):
            scores, slope = self._scores(q[a:b], k[ka:kb], a, ka, block, spec)
            weights = (scores - self._by_head(lse[a:b], k)).exp()
            dout = self._grouped(do[a:b], k)
            dv[ka:kb] += torch.einsum("kgts,tkgd->skd", weights, dout)
            dscores = torch.einsum("tkgd,skd->kgts", dout, v[ka:kb].to(wide)) - self._by_head(delta[a:b], k)
            dscores = dscores * weights * slope * spec.scale
            dq[a:b] = torch.einsum("kgts,skd->tkgd", dscores, k[ka:kb].to(wide)).flatten(1, 2)
            dk[ka:kb] += torch.einsum("kgts,tkgd->skd", dscores, self._grouped(q[a:b], k))
        return dq, dk.to(k.dtype), dv.to(v.dtype)

    @staticmethod
    def _grouped(t: Tensor, k: Tensor) -> Tensor:
        """(T, H, D) -> (T, K, H/K, D) in the accumulation dtype."""
        return t.to(accumulation_dtype(t.dtype)).unflatten(1, (k.shape[1], -1))

    @staticmethod
    def _by_head(t: Tensor, k: Tensor) -> Tensor:
        """(T, H) -> (K, H/K, T, 1)."""
        return t.T.unflatten(0, (k.shape[1], -1)).unsqueeze(-1)

    def _scores(self, q: Tensor, k: Tensor, q_row: int, k_row: int, block: Block, spec: AttentionSpec) -> tuple[Tensor, Tensor | float]:
        """Masked scores (K, H/K, T, S) and d(score)/d(raw score)."""
        scores = torch.einsum("tkgd,skd->kgts", self._grouped(q, k), k.to(accumulation_dtype(k.dtype))) * spec.scale
        slope: Tensor | float = 1.0
        if spec.softcap is not None:
            bent = (scores / spec.softcap).tanh()
            scores, slope = bent * spec.softcap, 1 - bent * bent
        distance = (torch.arange(q.shape[0], device=q.device) + q_row + block.offset).unsqueeze(1)
        distance = distance - (torch.arange(k.shape[0], device=q.device) + k_row)
        hidden = distance < 0
        if spec.window is not None:
            hidden |= distance >= spec.window
        return scores.masked_fill(hidden, float("-inf")), slope


def _query_chunks(num_queries: int, num_keys: int, block: Block, window: int | None) -> list[tuple[int, int, int, int]]:
    """(query start, stop, key start, stop): chunks of queries with the keys that any of them can see."""
    out = []
    for a in range(0, num_queries, MASKED_QUERY_CHUNK):
        b = min(a + MASKED_QUERY_CHUNK, num_queries)
        ka = 0 if window is None else max(0, a + block.offset - window + 1)
        kb = min(num_keys, b + block.offset) if block.causal else num_keys
        out.append((a, b, min(ka, kb), kb))
    return out


class CpuKernel(EachDocument):
    """torch's CPU flash operator (linear memory, returns lse, accepts merged o and lse), or the masked path where a mask is needed."""

    def __init__(self) -> None:
        self._masked = MaskedKernel()

    def forward(self, q: Tensor, k: Tensor, v: Tensor, block: Block, spec: AttentionSpec) -> tuple[Tensor, Tensor]:
        if block.windowed or spec.softcap is not None:
            return self._masked.forward(q, k, v, block, spec)
        operator = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        out, lse = operator(heads_first(q), heads_first(k), heads_first(v), 0.0, block.causal, scale=spec.scale)
        return tokens_first(out), lse[0].T

    def backward(
        self, do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, block: Block, spec: AttentionSpec
    ) -> tuple[Tensor, Tensor, Tensor]:
        if block.windowed or spec.softcap is not None:
            return self._masked.backward(do, q, k, v, o, lse, block, spec)
        operator = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
        rows = [heads_first(t) for t in (do, q, k, v, o)]
        grads = operator(*rows, lse.T.unsqueeze(0), 0.0, block.causal, scale=spec.scale)
        return tokens_first(grads[0]), tokens_first(grads[1]), tokens_first(grads[2])


def heads_first(t: Tensor) -> Tensor:
    """(T, H, D) -> (1, H, T, D), a view."""
    return t.transpose(0, 1).unsqueeze(0)


def tokens_first(t: Tensor) -> Tensor:
    """(1, H, T, D) -> (T, H, D), a view."""
    return t.squeeze(0).transpose(0, 1)
