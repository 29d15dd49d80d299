"""The attention core against dense softmax, over random slices, windows, softcaps and head counts."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from efflaunch.parallel.sequence.attention import (
    AttentionSpec,
    CpuKernel,
    MaskedKernel,
    Partial,
    add_blocks,
    attention_backward,
    attention_forward,
)
from efflaunch.parallel.sequence.blocks import attention_blocks
from efflaunch.parallel.sequence.layout import Slice, group_layout, split_slices, zigzag_slices


def dense(q, k, v, q_slices, k_slices, spec):
    """Reference: one masked softmax over everything."""

    def coordinates(slices):
        return torch.tensor([(piece.sequence, p) for piece in slices for p in range(piece.start, piece.stop)]).reshape(-1, 2)

    qc, kc = coordinates(q_slices), coordinates(k_slices)
    groups = q.shape[1] // k.shape[1]
    scores = torch.einsum("thd,shd->hts", q, k.repeat_interleave(groups, 1)) * spec.scale
    if spec.softcap:
        scores = spec.softcap * (scores / spec.softcap).tanh()
    distance = qc[:, None, 1] - kc[None, :, 1]
    seen = (qc[:, None, 0] == kc[None, :, 0]) & (distance >= 0)
    if spec.window:
        seen &= distance < spec.window
    weights = scores.masked_fill(~seen, float("-inf")).softmax(-1).nan_to_num(0.0)
    return torch.einsum("hts,shd->thd", weights, v.repeat_interleave(groups, 1))


@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 23), min_size=1, max_size=4),
    ring=st.sampled_from([1, 2, 3, 4]),
    window=st.sampled_from([None, 1, 4, 9]),
    softcap=st.sampled_from([None, 2.0]),
    kv_heads=st.sampled_from([1, 2, 4]),
    seed=st.integers(0, 99),
)
def test_blocks_merge_to_dense_attention(lengths, ring, window, softcap, kv_heads, seed):
    generator = torch.Generator().manual_seed(seed)
    spec = AttentionSpec(4, kv_heads, 8, 0.3, window, softcap)
    total = sum(lengths)
    whole = tuple(Slice(i, 0, n) for i, n in enumerate(lengths))
    k, v = (torch.randn(total, kv_heads, 8, dtype=torch.float64, generator=generator).requires_grad_() for _ in range(2))
    starts = [sum(lengths[:i]) for i in range(len(lengths))]
    rows_of = lambda slices: torch.tensor([starts[p.sequence] + t for p in slices for t in range(p.start, p.stop)], dtype=torch.long)  # noqa: E731
    q_slices = zigzag_slices(tuple(lengths), ring, seed % ring)
    q = torch.randn(sum(len(p) for p in q_slices), 4, 8, dtype=torch.float64, generator=generator).requires_grad_()
    do = torch.randn(q.shape, dtype=torch.float64, generator=generator)
    expected = dense(q, k, v, q_slices, whole, spec)
    want = torch.autograd.grad(expected, [q, k, v], do)

    kernel, partial = CpuKernel(), Partial(q, merges=True)
    shards = [(s := zigzag_slices(tuple(lengths), ring, i), rows_of(s), attention_blocks(q_slices, s, window)) for i in range(ring)]
    with torch.no_grad():
        for _, rows, blocks in shards:
            add_blocks(partial, q, k[rows], v[rows], blocks, spec, kernel)
        out, lse = partial.result()
        torch.testing.assert_close(out, expected, rtol=1e-11, atol=1e-12)
        dq, dk, dv = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
        for _, rows, blocks in shards:
            a, b, c = attention_backward(do, q, k[rows], v[rows], out, lse, blocks, spec, kernel)
            dq, dk[rows], dv[rows] = dq + a, dk[rows] + b, dv[rows] + c
    for got, reference in zip((dq, dk, dv), want, strict=True):
        torch.testing.assert_close(got, reference, rtol=1e-10, atol=1e-11)


def test_masked_and_flash_kernels_agree():
    torch.manual_seed(0)
    q, k, v, do = (
        torch.randn(700, 4, 8).double(),
        torch.randn(700, 2, 8).double(),
        torch.randn(700, 2, 8).double(),
        torch.randn(700, 4, 8).double(),
    )
    spec, blocks = AttentionSpec(4, 2, 8, 0.35), attention_blocks((Slice(0, 0, 700),), (Slice(0, 0, 700),))
    results = []
    for kernel in (CpuKernel(), MaskedKernel()):
        out, lse = attention_forward(q, k, v, blocks, spec, kernel)
        results.append((out, lse, *attention_backward(do, q, k, v, out, lse, blocks, spec, kernel)))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("window", [None, 5])
def test_blocks_cover_each_visible_pair_once(window):
    q_slices, k_slices = (Slice(0, 3, 9), Slice(1, 0, 4)), (Slice(0, 0, 5), Slice(0, 7, 12), Slice(1, 0, 2))
    rows = lambda slices: [(p.sequence, t) for p in slices for t in range(p.start, p.stop)]  # noqa: E731
    qs, ks = rows(q_slices), rows(k_slices)
    times = {}
    for block in attention_blocks(q_slices, k_slices, window):
        for i in range(block.q_start, block.q_stop):
            for j in range(block.k_start, block.k_stop):
                assert block.offset == qs[block.q_start][1] - ks[block.k_start][1]
                visible = not block.causal or i - block.q_start >= j - block.k_start
                if block.windowed:
                    visible &= qs[i][1] - ks[j][1] < window
                if visible:
                    times[i, j] = times.get((i, j), 0) + 1
    expected = {
        (i, j) for i, (a, p) in enumerate(qs) for j, (b, r) in enumerate(ks) if a == b and r <= p and (window is None or p - r < window)
    }
    assert set(times) == expected and set(times.values()) == {1}


@given(st.lists(st.integers(1, 40), min_size=1, max_size=6), st.sampled_from([1, 2, 4]), st.sampled_from([1, 2, 4]))
def test_layout_holds_every_token_once(lengths, ulysses, ring):
    layout = group_layout(tuple(lengths), ulysses=ulysses, ring=ring)
    held = [(p.sequence, t) for slices in layout.member_slices for p in slices for t in range(p.start, p.stop)]
    assert sorted(held) == [(i, t) for i, n in enumerate(lengths) for t in range(n)]
    for index, slices in enumerate(layout.ring_slices):
        assert sum(map(len, slices)) == sum(layout.num_tokens(index * ulysses + m) for m in range(ulysses))
    assert len(split_slices(layout.ring_slices[0], ulysses)) == ulysses
