"""Corpora of an evaluation: their passes as sources, and those that cannot be evaluated on."""

from __future__ import annotations

import numpy as np
import pytest

from efflaunch.errors import DataError
from efflaunch.tests.data.corpora import write_corpus
from efflaunch.training.data.source import IGNORE
from efflaunch.training.evaluation.config import EvalConfig
from efflaunch.training.evaluation.corpus import check_followed, open_corpora


def opened(prefix, *, vocab_size=1000, **fields):
    config = EvalConfig(name="t", corpora={"web": prefix}, **fields)
    return open_corpora(config, max_seq_len=32, vocab_size=vocab_size, tokenizer=None)[0]


def test_targets_are_those_that_count(tmp_path):
    prefix = write_corpus(tmp_path / "c", [list(range(40)), [1, 2, 3]])
    corpus = opened(prefix, lengths=[8, 16], context_tokens=10)
    assert list(corpus.passes) == ["whole", "short", 8, 16]
    source = corpus.source(8, 20, 1000)
    found = []
    for step in range(source.num_steps):
        for index, length in enumerate(source.lengths(step)):
            # Read as two ranks would: in two halves.
            halves = [source.tokens(step, index, 0, length // 2), source.tokens(step, index, length // 2, length)]
            targets = np.concatenate([half[1] for half in halves])
            assert (targets[: length - 4] == IGNORE).all()
            found += [target for target in targets.tolist() if target != IGNORE]
    assert found == [13, 14, 15, 16, 29, 30, 31, 32]


@pytest.mark.parametrize(
    ("documents", "masks", "fields", "found"),
    [
        ([[1], [2]], None, {}, "no target in"),
        ([[1, 2, 3]], [[1, 0, 0]], {}, "and a loss mask"),
        ([[1, 2, 3]], None, {"lengths": [8]}, "no target with 8 tokens of context: documents of up to 3 tokens"),
        ([[1, 2, 3]], None, {"vocab_size": 2}, None),
    ],
)
def test_what_cannot_be_evaluated_on(tmp_path, documents, masks, fields, found):
    prefix = write_corpus(tmp_path / "c", documents, masks)
    if found is None:
        source = opened(prefix, **fields).source("whole", 8, 2)
        with pytest.raises(DataError, match="token id 2"):
            source.tokens(0, 0, 0, 3)
        return
    with pytest.raises(DataError, match=r"eval\.corpora\.web") as caught:
        opened(prefix, **fields)
    assert found in str(caught.value)


def test_a_missing_corpus_is_named(tmp_path):
    with pytest.raises(DataError, match="nowhere"):
        opened(str(tmp_path / "nowhere"))


def test_a_gain_needs_documents_that_are_longer(tmp_path):
    corpus = opened(write_corpus(tmp_path / "c", [[1, 2, 3, 4, 5]]), context_tokens=30)
    check_followed("eval/web/loss", [corpus])
    with pytest.raises(DataError, match=r"train\.keep_best"):
        check_followed("eval/web/context_gain", [corpus])
