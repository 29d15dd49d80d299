"""The sampler: every target once per epoch, steps that partition the stream, a pure function of (seed, step)."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from efflaunch.errors import ConfigError, DataError
from efflaunch.training.data.sampler import Sampler, SequenceTable, shuffled

corpora = st.lists(st.lists(st.integers(0, 40), min_size=1, max_size=12), min_size=1, max_size=3)


def _table(lengths: list[list[int]], max_seq_len: int, split: bool = True) -> SequenceTable:
    return SequenceTable.from_lengths([np.array(corpus) for corpus in lengths], max_seq_len=max_seq_len, split=split)


@given(corpora, st.integers(2, 20))
def test_splitting_loses_no_target(lengths: list[list[int]], max_seq_len: int) -> None:
    table = _table(lengths, max_seq_len)
    predicted: Counter[tuple[int, int, int]] = Counter()
    for index in range(len(table)):
        piece = table[index]
        assert 1 <= len(piece) <= max_seq_len
        length = lengths[piece.corpus][piece.document]
        targets = range(piece.start + 1, min(piece.stop + 1, length))
        assert len(targets) > 0
        predicted.update((piece.corpus, piece.document, target) for target in targets)
    documents = [(c, d, n) for c, corpus in enumerate(lengths) for d, n in enumerate(corpus)]
    assert predicted == Counter({(c, d, t): 1 for c, d, n in documents for t in range(1, n)})
    assert table.num_too_short == sum(n < 2 for _, _, n in documents)


@given(corpora, st.integers(2, 20))
def test_dropping_keeps_whole_documents_only(lengths: list[list[int]], max_seq_len: int) -> None:
    table = _table(lengths, max_seq_len, split=False)
    kept = [(table[i].corpus, table[i].document, table[i].start, table[i].stop) for i in range(len(table))]
    expected = [(c, d, 0, n) for c, corpus in enumerate(lengths) for d, n in enumerate(corpus) if 2 <= n <= max_seq_len]
    assert kept == expected
    assert table.num_dropped == sum(n > max_seq_len for corpus in lengths for n in corpus)


@settings(max_examples=60)
@given(st.lists(st.integers(2, 40), min_size=1, max_size=30), st.integers(2, 16), st.integers(0, 3), st.integers(0, 60))
def test_steps_partition_the_stream_of_epochs(lengths: list[int], max_seq_len: int, seed: int, extra: int) -> None:
    table = _table([lengths], max_seq_len)
    batch = int(table.lengths.max()) + extra
    sampler = Sampler(table, seed, batch)
    stream: list[int] = []
    start = 0
    for step in range(2 + 3 * sampler.epoch_tokens // batch):
        rows = sampler.step(step)
        assert len(rows) >= 1
        for row in rows:
            assert step * batch <= start < (step + 1) * batch
            start += int(table.lengths[row])
            stream.append(int(row))
    for epoch in range(len(stream) // len(table)):
        assert sorted(stream[epoch * len(table) : (epoch + 1) * len(table)]) == list(range(len(table)))


def test_a_step_does_not_depend_on_the_steps_before_it() -> None:
    table = _table([list(range(2, 60))], 16)
    walked = Sampler(table, 7, 64)
    expected = [walked.step(step).tolist() for step in range(80)]
    for step in (79, 3, 41, 0, 3):
        assert Sampler(table, 7, 64).step(step).tolist() == expected[step]
        assert walked.step(step).tolist() == expected[step]
    assert [Sampler(table, 8, 64).step(step).tolist() for step in range(80)] != expected


def test_a_batch_may_span_several_epochs() -> None:
    table = _table([[5, 6, 7]], 8)
    rows = Sampler(table, 0, 100).step(0).tolist()
    assert Counter(rows[:15]) == {0: 5, 1: 5, 2: 5}


def test_the_order_is_the_same_on_every_machine_and_numpy() -> None:
    assert shuffled(12, seed=3, epoch=1).tolist() == [5, 1, 4, 6, 0, 10, 11, 3, 9, 2, 7, 8]
    assert shuffled(12, seed=3, epoch=2).tolist() != shuffled(12, seed=3, epoch=1).tolist()


def test_the_order_is_even() -> None:
    """Each item is in each tenth of the order as often as chance says (5 standard deviations)."""
    places = np.array([np.argsort(shuffled(1000, seed=0, epoch=epoch)) // 100 for epoch in range(400)])
    counts = np.stack([(places == tenth).sum(axis=0) for tenth in range(10)])
    assert counts.min() > 40 - 5 * 6 and counts.max() < 40 + 6 * 6


def test_ten_million_documents() -> None:
    """Long-tailed lengths at full size: the steps at both ends of an epoch hold what they must."""
    lengths = (np.arange(10_000_000, dtype=np.int64) * 7919) % 3001
    table = SequenceTable.from_lengths([lengths], max_seq_len=1024, split=True)
    expected_targets = int(np.maximum(lengths - 1, 0).sum())
    last = np.minimum(table.stop + 1, lengths[table.document])
    assert int((last - table.start - 1).sum()) == expected_targets
    sampler = Sampler(table, 1, 1 << 20)
    rows = sampler.step(sampler.epoch_tokens // (1 << 20))
    total = int(table.lengths_of(rows).sum())
    assert abs(total - (1 << 20)) < 1024


def test_a_batch_below_the_longest_sequence_is_refused() -> None:
    with pytest.raises(
        ConfigError, match=r"data.global_batch_tokens: found 15; expected at least the longest sequence, 16 tokens"
    ) as error:
        Sampler(_table([[5, 30]], 16), 0, 15)
    assert error.value.hint == "data.global_batch_tokens=16"


def test_nothing_to_train_on() -> None:
    with pytest.raises(DataError, match="data: found no sequence to train on; expected documents of two tokens or more"):
        Sampler(_table([[0, 1, 1]], 16), 0, 64)


def test_a_sequence_of_one_token_is_no_sequence() -> None:
    with pytest.raises(ConfigError, match=r"data\.max_seq_len: found 1; expected at least 2 tokens"):
        _table([[5]], 1)
