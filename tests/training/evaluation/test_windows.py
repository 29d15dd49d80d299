"""Which windows an evaluation reads, and what of them counts."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from efflaunch.training.data.sampler import SequenceTable
from efflaunch.training.evaluation.windows import length_windows, short_windows, whole_windows

LENGTHS = st.lists(st.integers(0, 90), min_size=1, max_size=12).map(lambda items: np.array(items, dtype=np.int64))


def targets(windows, lengths):
    """(document, position) of every target that counts, in order; each must count once."""
    found = []
    for document, stop, first in zip(windows.document.tolist(), windows.stop.tolist(), windows.first.tolist(), strict=True):
        found += [(document, position) for position in range(first, min(stop, int(lengths[document]) - 1))]
    return found


@given(LENGTHS, st.integers(2, 40))
def test_whole_is_what_training_reads(lengths, max_seq_len):
    windows = whole_windows(lengths, max_seq_len, None)
    table = SequenceTable.from_lengths([lengths], max_seq_len=max_seq_len, split=True)
    for column in ("document", "start", "stop"):
        assert np.array_equal(getattr(windows, column), getattr(table, column))
    found = targets(windows, lengths)
    assert len(found) == len(set(found)) == windows.num_targets(lengths) == sum(max(n - 1, 0) for n in lengths.tolist())


@given(LENGTHS, st.integers(2, 40), st.integers(2, 20))
def test_short_has_the_targets_with_more_context(lengths, max_seq_len, context):
    whole = whole_windows(lengths, max_seq_len, None)
    short = short_windows(whole, context)
    wanted = {
        (document, position)
        for document, start, stop in zip(whole.document.tolist(), whole.start.tolist(), whole.stop.tolist(), strict=True)
        for position in range(start + context, min(stop, int(lengths[document]) - 1))
    }
    found = targets(short, lengths)
    assert len(found) == len(set(found)) and set(found) == wanted
    for start, stop, first in zip(short.start.tolist(), short.stop.tolist(), short.first.tolist(), strict=True):
        assert 0 < stop - start <= context and context - max(context // 2, 1) <= first - start < context


@given(LENGTHS, st.lists(st.integers(2, 40), min_size=1, max_size=3))
def test_every_length_has_the_same_targets(lengths, eval_lengths):
    passes = length_windows(lengths, eval_lengths, None)
    assert list(passes) == sorted(set(eval_lengths))
    first = targets(passes[min(passes)], lengths)
    longest = max(eval_lengths)
    assert len(first) == len(set(first))
    for length, windows in passes.items():
        assert targets(windows, lengths) == first
        assert np.array_equal(windows.stop - windows.start, np.full(len(windows), length)) and (windows.start >= 0).all()
        assert len(windows) == int((lengths // longest).sum())


def test_no_lengths_no_passes():
    assert length_windows(np.array([100]), [], None) == {}


@pytest.mark.parametrize("most", [1, 200, 1000, 10**9])
def test_a_budget_is_kept_and_spread(most):
    lengths = np.full(100, 50, dtype=np.int64)
    windows = whole_windows(lengths, 64, most)
    assert windows.num_tokens == max(50, min(most // 50 * 50, 5000))
    assert np.array_equal(windows.document, np.sort(windows.document))
    assert np.array_equal(windows.document, whole_windows(lengths, 64, most).document), "the same ones each time"
    if most == 1000:
        assert windows.document.max() > 60 and windows.document.min() < 40
    passes = length_windows(lengths, [10, 25], most)
    assert len(passes[10]) == len(passes[25]) == max(1, min(most // 25, 200))
