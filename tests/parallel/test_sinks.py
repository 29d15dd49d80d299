"""Attention with sinks against one softmax over all keys and the sink, over slices, windows, softcaps and head counts."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from efflaunch.parallel.sequence import sinks as module
from efflaunch.parallel.sequence.attention import (
    AttentionSpec,
    BlockKernel,
    CpuKernel,
    MaskedKernel,
    Partial,
    add_blocks,
    attention_backward,
)
from efflaunch.parallel.sequence.blocks import attention_blocks
from efflaunch.parallel.sequence.layout import Slice, zigzag_slices
from efflaunch.parallel.sequence.sinks import join_sinks, sink_gradient

HEADS, DIM = 4, 8
Slices = tuple[Slice, ...]


def softmax_with_sinks(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor, at: tuple[Tensor, Tensor], spec: AttentionSpec) -> Tensor:
    """One softmax over keys and sink, the sink's column dropped. `at`: (sequence, position) of each query row and of each key row."""
    share = q.shape[1] // k.shape[1]
    scores = torch.einsum("thd,shd->hts", q, k.repeat_interleave(share, 1)) * spec.scale
    if spec.softcap is not None:
        scores = spec.softcap * (scores / spec.softcap).tanh()
    queries, keys = at
    distance = queries[:, None, 1] - keys[None, :, 1]
    seen = (queries[:, None, 0] == keys[None, :, 0]) & (distance >= 0)
    if spec.window is not None:
        seen &= distance < spec.window
    column = sinks[:, None, None].expand(-1, q.shape[0], 1)
    weights = torch.cat((scores.masked_fill(~seen, float("-inf")), column), -1).softmax(-1)[..., :-1]
    return torch.einsum("hts,shd->thd", weights, v.repeat_interleave(share, 1))


def coordinates(slices: Slices) -> Tensor:
    return torch.tensor([(piece.sequence, p) for piece in slices for p in range(piece.start, piece.stop)]).reshape(-1, 2)


def ours(leaves: list[Tensor], do: Tensor, shards: list[tuple[Tensor, tuple]], spec: AttentionSpec, kernel: BlockKernel) -> list[Tensor]:
    """o, and the gradients of q, k, v and sinks; keys visit shard by shard as in a ring. `shards`: rows of the keys, blocks."""
    q, k, v, sinks = (leaf.detach() for leaf in leaves)
    partial = Partial(q, merges=True)
    for rows, blocks in shards:
        add_blocks(partial, q, k[rows], v[rows], blocks, spec, kernel)
    o, lse = partial.result()
    join_sinks(o, lse, sinks)
    dq, dk, dv = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    for rows, blocks in shards:
        a, b, c = attention_backward(do, q, k[rows], v[rows], o, lse, blocks, spec, kernel)
        dq, dk[rows], dv[rows] = dq + a, dk[rows] + b, dv[rows] + c
    return [o, dq, dk, dv, sink_gradient(do, o, lse, sinks)]


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 23), min_size=1, max_size=4),
    ring=st.sampled_from([1, 2, 3]),
    window=st.sampled_from([None, 1, 4, 9]),
    softcap=st.sampled_from([None, 2.0]),
    kv_heads=st.sampled_from([1, 2, 4]),
    kernel=st.sampled_from([CpuKernel(), MaskedKernel()]),
    height=st.sampled_from([-30.0, 0.0, 4.0, 30.0]),
    seed=st.integers(0, 99),
)
def test_merged_results_take_the_sink(
    lengths: list[int], ring: int, window: int | None, softcap: float | None, kv_heads: int, kernel: BlockKernel, height: float, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    spec, total = AttentionSpec(HEADS, kv_heads, DIM, 0.3, window, softcap), sum(lengths)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.float64, generator=generator)

    whole = tuple(Slice(i, 0, n) for i, n in enumerate(lengths))
    mine = zigzag_slices(tuple(lengths), ring, seed % ring)
    leaves = [random(sum(map(len, mine)), HEADS, DIM), random(total, kv_heads, DIM), random(total, kv_heads, DIM), height + random(HEADS)]
    leaves, do = [leaf.requires_grad_() for leaf in leaves], random(*leaves[0].shape)
    expected = softmax_with_sinks(*leaves, (coordinates(mine), coordinates(whole)), spec)
    wanted = [expected.detach(), *torch.autograd.grad(expected, leaves, do)]

    place = {tuple(at): row for row, at in enumerate(coordinates(whole).tolist())}
    shards = []
    for index in range(ring):
        theirs = zigzag_slices(tuple(lengths), ring, index)
        rows = torch.tensor([place[tuple(at)] for at in coordinates(theirs).tolist()], dtype=torch.long)
        shards.append((rows, attention_blocks(mine, theirs, window)))
    for got, reference in zip(ours(leaves, do, shards, spec, kernel), wanted, strict=True):
        torch.testing.assert_close(got, reference, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rows_are_widened_a_few_at_a_time_and_nothing_else(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """The result takes the place of what it was made from, and each part of the rows has the same numbers as all at once."""
    generator = torch.Generator().manual_seed(3)
    o, do = (torch.randn(23, HEADS, DIM, generator=generator).to(dtype) for _ in range(2))
    lse, sinks = torch.randn(23, HEADS, generator=generator), torch.randn(HEADS, generator=generator).to(dtype)
    results = []
    for most in (5, 100):
        monkeypatch.setattr(module, "WIDENED_ROWS", most)
        joined, total = o.clone(), lse.clone()
        join_sinks(joined, total, sinks)
        results.append((joined, total, sink_gradient(do, joined, total, sinks)))
    (joined, total, gradient), (at_once, _, _) = results
    assert joined.dtype == dtype and gradient.dtype == torch.float32 and torch.equal(joined, at_once)
    share = lse.exp() / (lse.exp() + sinks.float().exp())
    torch.testing.assert_close(joined, (o.float() * share.unsqueeze(-1)).to(dtype))
    torch.testing.assert_close(total, (lse.exp() + sinks.float().exp()).log())
    exact = -((1 - share) * (do.double() * joined.double()).sum(-1)).sum(0).float()
    torch.testing.assert_close(gradient, exact, rtol=1e-5, atol=1e-5)


def test_rows_without_keys_stay_zero_and_no_rows_have_no_gradient() -> None:
    sinks, o, lse = torch.tensor([0.5, -2.0]), torch.zeros(3, 2, 4), torch.full((3, 2), float("-inf"))
    join_sinks(o, lse, sinks)
    assert torch.equal(o, torch.zeros(3, 2, 4)) and torch.equal(lse, sinks.expand(3, 2))
    assert torch.equal(sink_gradient(torch.ones(3, 2, 4), o, lse, sinks), torch.zeros(2))
    assert torch.equal(sink_gradient(torch.ones(0, 2, 4), o[:0], lse[:0], sinks), torch.zeros(2))
