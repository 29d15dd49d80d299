"""Attention by chunks of queries: blocks with few keys each, key gradients added up in place, against all of it at once."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from efflaunch.parallel.sequence.attention import AttentionSpec, CpuKernel, attention_backward, attention_backward_into, attention_forward
from efflaunch.parallel.sequence.blocks import Documents, attention_blocks, join_documents, split_keys
from efflaunch.parallel.sequence.layout import Slice, cut_slices


@given(
    st.lists(st.integers(1, 20), min_size=1, max_size=4), st.integers(1, 9), st.sampled_from([None, 1, 5]), st.integers(0, 30), st.data()
)
def test_splitting_keys_leaves_every_visible_pair_once(lengths, most, window, start, data):
    whole = tuple(Slice(i, 0, n) for i, n in enumerate(lengths))
    stop = data.draw(st.integers(start, start + 20))
    queries = cut_slices(whole, start, stop)
    blocks = split_keys(attention_blocks(queries, whole, window), most, window)
    assert all(block.k_stop - block.k_start <= most for block in blocks)
    seen = sorted(pair for block in blocks for pair in _visible(block, window))
    keys = [(piece.sequence, t) for piece in whole for t in range(piece.start, piece.stop)]
    wanted = [
        (row, key)
        for row, (sequence, t) in enumerate((piece.sequence, t) for piece in queries for t in range(piece.start, piece.stop))
        for key, (other, u) in enumerate(keys)
        if other == sequence and t - u >= 0 and (window is None or t - u < window)
    ]
    assert seen == wanted


@given(
    st.lists(st.integers(1, 20), min_size=1, max_size=6), st.sampled_from([None, 3, 12]), st.sampled_from([None, 1, 5]),
    st.integers(0, 30), st.data(),
)  # fmt: skip
def test_joined_documents_are_the_same_blocks(lengths, most, window, start, data):
    whole = tuple(Slice(i, 0, n) for i, n in enumerate(lengths))
    queries = cut_slices(whole, start, data.draw(st.integers(start, start + 40)))
    blocks = attention_blocks(queries, whole, window)
    blocks = split_keys(blocks, most, window) if most else blocks
    apart = []
    for call in join_documents(blocks, most):
        if isinstance(call, Documents):
            assert call.count > 1 and (most is None or call.k_stop - call.k_start <= most)
            assert call.windowed == any(block.windowed for block in call.each(window))
            assert call.longest == max(block.q_stop - block.q_start for block in call.each(window))
        each = call.each(window) if isinstance(call, Documents) else [call]
        q, k = (call.q_start, call.k_start) if isinstance(call, Documents) else (0, 0)
        apart += [(b.q_start + q, b.q_stop + q, b.k_start + k, b.k_stop + k, b.causal, b.windowed) for b in each]
    wanted = [(b.q_start, b.q_stop, b.k_start, b.k_stop, b.causal, b.windowed) for b in blocks]
    assert sorted(apart) == sorted(wanted)


def test_whole_documents_are_one_call():
    whole = tuple(Slice(i, 0, 10) for i in range(100))
    (call,) = join_documents(attention_blocks(whole, whole, 4))
    assert (call.count, call.longest, call.q_stop, call.k_stop, call.windowed) == (100, 10, 1000, 1000, True)
    assert len(join_documents(attention_blocks(whole, whole), pads=5)) == 1, "half as many rows again"
    calls = join_documents(attention_blocks(whole, whole), pads=6)
    assert [call.count for call in calls] == [62, 38] and all(call.cuts[-1] + 6 * call.count <= 1000 for call in calls)
    (alone,) = join_documents(attention_blocks(whole[:1], whole[:1]))
    assert not isinstance(alone, Documents)


def _visible(block, window):
    for i in range(block.q_stop - block.q_start):
        for j in range(block.k_stop - block.k_start):
            distance = block.offset + i - j
            assert block.windowed or window is None or distance < window, "a block whose mask nobody applies"
            if (not block.causal or j <= i) and (distance < window if block.windowed else True):
                yield block.q_start + i, block.k_start + j


@settings(max_examples=20, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 23), min_size=1, max_size=3),
    chunk=st.integers(3, 40),
    window=st.sampled_from([None, 4]),
    softcap=st.sampled_from([None, 2.0]),
)
def test_chunks_of_queries_give_what_all_queries_give(lengths, chunk, window, softcap):
    torch.manual_seed(0)
    spec, total = AttentionSpec(4, 2, 8, 0.3, window, softcap), sum(lengths)
    whole, kernel = tuple(Slice(i, 0, n) for i, n in enumerate(lengths)), CpuKernel()
    q, do = (torch.randn(total, 4, 8, dtype=torch.float64) for _ in range(2))
    k, v = (torch.randn(total, 2, 8, dtype=torch.float64) for _ in range(2))
    blocks = attention_blocks(whole, whole, window)
    o, lse = attention_forward(q, k, v, blocks, spec, kernel)
    wanted = attention_backward(do, q, k, v, o, lse, blocks, spec, kernel)
    totals, dq = (torch.zeros_like(k), torch.zeros_like(v)), torch.empty_like(q)
    for start in reversed(range(0, total, chunk)):
        rows = slice(start, min(start + chunk, total))
        part = attention_blocks(cut_slices(whole, rows.start, rows.stop), whole, window)
        torch.testing.assert_close(attention_forward(q[rows], k, v, part, spec, kernel), (o[rows], lse[rows]), rtol=1e-12, atol=1e-12)
        small = split_keys(part, 7, window)
        dq[rows] = attention_backward_into(do[rows], (q[rows], k, v), o[rows], lse[rows], small, spec, kernel, totals)
        # Queries before these see none of their keys: what is left to come leaves the sums of these keys alone.
        for total_gradient, final in zip(totals, wanted[1:], strict=True):
            torch.testing.assert_close(total_gradient[rows], final[rows], rtol=1e-10, atol=1e-11)
    torch.testing.assert_close((dq, *totals), wanted, rtol=1e-10, atol=1e-11)


def test_rows_are_cut_across_slices():
    slices = (Slice(0, 3, 6), Slice(1, 0, 2), Slice(2, 5, 9))
    assert cut_slices(slices, 1, 6) == (Slice(0, 4, 6), Slice(1, 0, 2), Slice(2, 5, 6))
    assert cut_slices(slices, 4, 4) == () and cut_slices(slices, 0, 9) == slices
