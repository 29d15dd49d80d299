"""Stand-ins for the attention libraries of CUDA: what their functions compute, in plain torch on the CPU and in float64.

They are put where the real ones are: as a module `flash_attn.flash_attn_interface`, and as the CPU's version of torch's operators, whose
schemas then check every call. Masks are bottom-right, a bound below 0 or None is none, log-sum-exp is (1, H, T) or, of documents, (H, T).
"""

from __future__ import annotations

import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.library import Library

LEAST = float("-inf")


def _scores(q: Tensor, k: Tensor, scale: float, causal: bool, left: Any, right: Any, softcap: float) -> tuple[Tensor, Tensor]:
    """(H, T, S) masked scores and their slope by softcap; q (T, H, D), k (S, H, D)."""
    raw = torch.einsum("thd,shd->hts", q, k) * scale
    bent = (raw / softcap).tanh() if softcap else raw
    scores, slope = (bent * softcap, 1 - bent * bent) if softcap else (raw, torch.ones_like(raw))
    diagonal = torch.arange(len(q)).unsqueeze(1) + len(k) - len(q)
    keys = torch.arange(len(k))
    bound = 0 if causal else right
    hidden = torch.zeros(len(q), len(k), dtype=torch.bool)
    if bound is not None and bound >= 0:
        hidden |= keys > diagonal + bound
    if left is not None and left >= 0:
        hidden |= keys < diagonal - left
    return scores.masked_fill(hidden, LEAST), slope


def forward_one(q: Tensor, k: Tensor, v: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
    """o (T, H, D) and lse (H, T) of one block; `options` of `_scores`."""
    share = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(share, 1), v.repeat_interleave(share, 1)
    scores, _ = _scores(q, k, *options)
    return torch.einsum("hts,shd->thd", scores.softmax(-1), v), scores.logsumexp(-1)


def backward_one(do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, *options: Any) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv of one block by the o and lse (H, T) of all blocks."""
    groups, share = k.shape[1], q.shape[1] // k.shape[1]
    wide, values = k.repeat_interleave(share, 1), v.repeat_interleave(share, 1)
    scores, slope = _scores(q, wide, *options)
    weights = (scores - lse.unsqueeze(-1)).exp()
    delta = (do * o).sum(-1).T.unsqueeze(-1)
    ds = weights * (torch.einsum("thd,shd->hts", do, values) - delta) * slope * options[0]
    dk, dv = torch.einsum("hts,thd->shd", ds, q), torch.einsum("hts,thd->shd", weights, do)
    return torch.einsum("hts,shd->thd", ds, wide), dk.unflatten(1, (groups, share)).sum(2), dv.unflatten(1, (groups, share)).sum(2)


class Calls:
    """What was called, with how many documents or how many heads."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self.heads: list[int] = []
        self.in_order: list[bool] = []
        """Whether each backward of flash-attn was to be deterministic."""

    def forward(self, name: str, q: Tensor, k: Tensor, v: Tensor, cuts: Tensor | None, *options: Any) -> tuple[Tensor, Tensor]:
        """o and lse in the shapes of `q`: four dims for one block, three with `cuts`."""
        self.names.append(name)
        if cuts is None:
            assert q.dim() == 4 and len(q) == 1
            o, lse = forward_one(q[0], k[0], v[0], *options)
            return o.unsqueeze(0), lse.unsqueeze(0)
        self._check(cuts, q)
        parts = [forward_one(q[a:b], k[a:b], v[a:b], *options) for a, b in pairwise(cuts.tolist())]
        return torch.cat([o for o, _ in parts]), torch.cat([lse for _, lse in parts], 1)

    def backward(self, name: str, rows: list[Tensor], cuts: Tensor | None, *options: Any) -> tuple[Tensor, Tensor, Tensor]:
        """dq, dk, dv; `rows`: do, q, k, v, o and lse."""
        self.names.append(name)
        self.heads.append(rows[1].shape[-2])
        assert rows[0].is_contiguous() and rows[5].is_contiguous()
        if cuts is None:
            assert rows[1].dim() == 4 and rows[5].dim() == 3
            grads = backward_one(*(t[0] for t in rows), *options)
            return grads[0].unsqueeze(0), grads[1].unsqueeze(0), grads[2].unsqueeze(0)
        self._check(cuts, rows[1])
        parts = [backward_one(*(t[a:b] for t in rows[:5]), rows[5][:, a:b], *options) for a, b in pairwise(cuts.tolist())]
        return torch.cat([a for a, _, _ in parts]), torch.cat([b for _, b, _ in parts]), torch.cat([c for _, _, c in parts])

    @staticmethod
    def _check(cuts: Tensor, q: Tensor) -> None:
        assert cuts.dtype == torch.int32 and cuts[0] == 0 and cuts[-1] == len(q) and q.dim() == 3


def stub_flash_attn(monkeypatch: pytest.MonkeyPatch, calls: Calls) -> None:
    """Put a `flash_attn.flash_attn_interface` in place whose functions have 2.8's parameters."""

    def _flash_attn_forward(q, k, v, dropout_p, softmax_scale, causal, window_size_left, window_size_right, softcap, alibi_slopes, return_softmax):  # type: ignore[no-untyped-def]  # noqa: E501
        assert not (dropout_p or alibi_slopes or return_softmax)
        return *calls.forward("block", q, k, v, None, softmax_scale, causal, window_size_left, window_size_right, softcap), None, None

    def _flash_attn_varlen_forward(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p, softmax_scale, causal, window_size_left=-1, window_size_right=-1, softcap=0.0, alibi_slopes=None, return_softmax=False):  # type: ignore[no-untyped-def]  # noqa: E501
        assert max_seqlen_q == max_seqlen_k == int(cu_seqlens_q.diff().max()) and cu_seqlens_q is cu_seqlens_k
        return *calls.forward("documents", q, k, v, cu_seqlens_q, softmax_scale, causal, window_size_left, window_size_right, softcap), None, None  # noqa: E501

    def _flash_attn_backward(dout, q, k, v, out, softmax_lse, dq, dk, dv, dropout_p, softmax_scale, causal, window_size_left, window_size_right, softcap, alibi_slopes, deterministic):  # type: ignore[no-untyped-def]  # noqa: E501
        calls.in_order.append(deterministic)
        options = softmax_scale, causal, window_size_left, window_size_right, softcap
        for into, part in zip((dq, dk, dv), calls.backward("block", [dout, q, k, v, out, softmax_lse], None, *options), strict=True):
            into.copy_(part)

    def _flash_attn_varlen_backward(dout, q, k, v, out, softmax_lse, dq, dk, dv, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p, softmax_scale, causal, window_size_left, window_size_right, softcap, alibi_slopes, deterministic):  # type: ignore[no-untyped-def]  # noqa: E501
        calls.in_order.append(deterministic)
        options = softmax_scale, causal, window_size_left, window_size_right, softcap
        rows = [dout, q, k, v, out, softmax_lse]
        for into, part in zip((dq, dk, dv), calls.backward("documents", rows, cu_seqlens_q, *options), strict=True):
            into.copy_(part)

    package, module = types.ModuleType("flash_attn"), types.ModuleType("flash_attn.flash_attn_interface")
    for function in (_flash_attn_forward, _flash_attn_varlen_forward, _flash_attn_backward, _flash_attn_varlen_backward):
        setattr(module, function.__name__, function)
    monkeypatch.setitem(sys.modules, "flash_attn", package)
    monkeypatch.setitem(sys.modules, "flash_attn.flash_attn_interface", module)


@contextmanager
def torch_operators_on_cpu(calls: Calls) -> Iterator[None]:
    """torch's flash and cuDNN operators run on the CPU inside."""

    def forward(q, k, v, cuts, _, longest_q, longest_k, dropout, causal, debug, *, scale=None, window_size_left=None, window_size_right=None, **rest):  # type: ignore[no-untyped-def]  # noqa: E501
        name = "block" if cuts is None else "documents"
        o, lse = calls.forward(name, q, k, v, cuts, scale, causal, window_size_left, window_size_right, 0.0)
        return o, lse, torch.empty(2, dtype=torch.uint64), torch.empty(0), torch.empty(0)

    def backward(do, q, k, v, o, lse, cuts, _, longest_q, longest_k, dropout, causal, rng, unused, *, scale=None, window_size_left=None, window_size_right=None):  # type: ignore[no-untyped-def]  # noqa: E501
        name = "block" if cuts is None else "documents"
        return calls.backward(name, [do, q, k, v, o, lse], cuts, scale, causal, window_size_left, window_size_right, 0.0)

    def cudnn(q, k, v, bias, with_lse, dropout=0.0, causal=False, debug=False, *, scale=None):  # type: ignore[no-untyped-def]
        rows = [t.transpose(1, 2) for t in (q, k, v)]
        o, lse = calls.forward("cudnn", *rows, None, scale, causal, None, None, 0.0)
        empty = torch.empty(0, dtype=torch.int64)
        return o.transpose(1, 2), lse.unsqueeze(-1), empty, empty, q.shape[2], k.shape[2], empty, empty, empty

    def cudnn_backward(do, q, k, v, o, lse, seed, offset, bias, cuts, _, longest_q, longest_k, dropout, causal, *, scale=None):  # type: ignore[no-untyped-def]
        assert lse.shape == (*q.shape[:3], 1)
        rows = [t.transpose(1, 2) for t in (do, q, k, v, o)]
        rows[0] = rows[0].contiguous()
        return tuple(t.transpose(1, 2) for t in calls.backward("cudnn", [*rows, lse[..., 0]], None, scale, causal, None, None, 0.0))

    library = Library("aten", "IMPL")
    library.impl("_flash_attention_forward", forward, "CPU")
    library.impl("_flash_attention_backward", backward, "CPU")
    library.impl("_scaled_dot_product_cudnn_attention", cudnn, "CPU")
    library.impl("_scaled_dot_product_cudnn_attention_backward", cudnn_backward, "CPU")
    try:
        yield
    finally:
        library._destroy()
