"""The data source: targets, loss masks, checks on ids and vocabularies, and what bad data is called."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from efflaunch.errors import ConfigError, DataError
from efflaunch.training.config import Learn
from efflaunch.training.data.builtin import train_tokenizer
from efflaunch.training.data.config import DataConfig, LongDocuments, SourceConfig, check_cross_document
from efflaunch.training.data.identity import corpus_content, data_changes, data_identity, settings_of
from efflaunch.training.data.source import open_data

from .corpora import write_corpus


def _config(*prefixes: str, **changes: Any) -> DataConfig:
    return DataConfig(**{"name": "t", "prefixes": list(prefixes), "max_seq_len": 8, "global_batch_tokens": 1000, **changes})


def test_targets_are_the_next_tokens_across_pieces(tmp_path: Path) -> None:
    source = open_data(_config(write_corpus(tmp_path / "c", [list(range(20))]), global_batch_tokens=20), 0, 100)
    read = {}
    for index, row in enumerate(source.sampler.step(0).tolist()):
        piece = source.table[row]
        ids, targets = source.tokens(0, index, 0, len(piece))
        read[piece.start] = (ids.tolist(), targets.tolist())
    assert read == {
        0: (list(range(8)), list(range(1, 9))),
        8: (list(range(8, 16)), list(range(9, 17))),
        16: ([16, 17, 18, 19], [17, 18, 19, -100]),
    }
    assert source.num_target_tokens(0) == 19
    assert sorted(source.lengths(0)) == [4, 8, 8]


def test_masked_tokens_are_no_targets(tmp_path: Path) -> None:
    prefix = write_corpus(tmp_path / "c", [[1, 2, 3, 4, 5]], [[1, 0, 1, 0, 1]])
    source = open_data(_config(prefix, global_batch_tokens=8), 0, 100)
    assert source.tokens(0, 0, 0, 5)[1].tolist() == [-100, 3, -100, 5, -100]
    assert source.tokens(0, 0, 1, 3)[1].tolist() == [3, -100]
    assert source.tokens(0, 0, 3, 5)[1].tolist() == [5, -100]


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_target_counts_match_what_is_read(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    folder = tmp_path_factory.mktemp("c")
    lengths = data.draw(st.lists(st.integers(2, 30), min_size=1, max_size=6))
    masks = [data.draw(st.lists(st.integers(0, 1), min_size=n, max_size=n).filter(lambda m: any(m[1:]))) for n in lengths]
    prefix = write_corpus(folder / "c", [[1] * n for n in lengths], masks)
    plain = write_corpus(folder / "d", [[1, 1, 1]])
    source = open_data(_config(prefix, plain, global_batch_tokens=data.draw(st.integers(8, 60))), 0, 10)
    for step in range(4):
        pieces = [source.tokens(step, index, 0, length)[1] for index, length in enumerate(source.lengths(step))]
        assert source.num_target_tokens(step) == sum(int((piece != -100).sum()) for piece in pieces)
        assert all((piece != -100).any() for piece in pieces)


def test_short_documents_are_skipped_and_counted(tmp_path: Path) -> None:
    source = open_data(_config(write_corpus(tmp_path / "c", [[1], [], [1, 2]])), 0, 100)
    assert source.summary() == "1 sequences, 2 tokens per epoch, 2 documents under 2 tokens skipped"


def test_long_documents_are_dropped_and_counted(tmp_path: Path) -> None:
    prefix = write_corpus(tmp_path / "c", [[1] * 9, [1] * 8])
    source = open_data(_config(prefix, long_documents=LongDocuments.DROP), 0, 100)
    assert source.summary() == "1 sequences, 8 tokens per epoch, 1 documents over max_seq_len dropped"


def test_long_documents_are_truncated_and_counted(tmp_path: Path) -> None:
    """To the first of the pieces that they would be split into, its last target included."""
    prefix = write_corpus(tmp_path / "c", [list(range(20)), [30, 31, 32], list(range(40, 48))])
    config = _config(prefix, long_documents=LongDocuments.TRUNCATE, global_batch_tokens=19)
    source = open_data(config, 0, 100)
    assert source.summary() == "3 sequences, 19 tokens per epoch, 1 documents over max_seq_len truncated"
    read = {source.sequence(0, index).document: source.tokens(0, index, 0, length) for index, length in enumerate(source.lengths(0))}
    assert [ids.tolist() for ids in read[0]] == [list(range(8)), list(range(1, 9))]
    assert [ids.tolist() for ids in read[2]] == [list(range(40, 48)), [*range(41, 48), -100]]
    assert source.num_target_tokens(0) == 8 + 2 + 7


def test_a_truncated_document_that_is_all_prompt_is_left_out(tmp_path: Path) -> None:
    prefix = write_corpus(tmp_path / "c", [[1] * 20, [2] * 20, [50, 51]], [[0] * 16 + [1] * 4, [0] * 8 + [1] * 12, [1, 1]])
    source = open_data(_config(prefix, long_documents=LongDocuments.TRUNCATE), 0, 100)
    assert [source.table[row].document for row in range(len(source.table))] == [1, 2]


def test_all_tokens_are_learnt_where_that_is_asked_for(tmp_path: Path) -> None:
    prefix = write_corpus(tmp_path / "c", [[1, 2, 3, 4, 5]], [[0, 0, 0, 1, 1]])
    masked, everything = (open_data(_config(prefix, global_batch_tokens=5, max_seq_len=5), 0, 100, learn=learn) for learn in Learn)
    assert masked.tokens(0, 0, 0, 5)[1].tolist() == [-100, -100, 4, 5, -100] and masked.num_target_tokens(0) == 2
    assert everything.tokens(0, 0, 0, 5)[1].tolist() == [2, 3, 4, 5, -100] and everything.num_target_tokens(0) == 4
    # What the files hold is the same: no other corpus for a resume.
    assert corpus_content(everything.corpora[0]) == corpus_content(masked.corpora[0])
    before, after = (data_identity(masked.corpora, settings_of(_config(prefix), 0, (), learn), "s") for learn in Learn)
    lines = data_changes(before, after)
    assert lines.asked_for == ("train.learn: assistant -> all",) and not lines.silent


def test_sequences_go_over_the_borders_of_documents_where_that_is_asked_for(tmp_path: Path) -> None:
    prefix = write_corpus(tmp_path / "c", [[1, 2, 3], [4], list(range(5, 18))], [[1, 1, 0], [1], [1] * 13])
    config = _config(prefix, cross_document=True, global_batch_tokens=16)
    source = open_data(config, 0, 100)
    read = sorted([ids.tolist() for ids in source.tokens(0, index, 0, length)] for index, length in enumerate(source.lengths(0)))
    # Nothing is too short, and the last token of a document predicts the first of the next one.
    assert read == [[list(range(1, 9)), [2, -100, *range(4, 10)]], [list(range(9, 17)), list(range(10, 18))]]
    assert source.parts(0, 0) == (8,) and source.num_target_tokens(0) == 15
    assert "attention over the borders of documents" in source.summary()
    before, after = (
        data_identity(one.corpora, settings_of(_config(prefix, cross_document=joined), 0), one.fingerprint())
        for joined in (False, True)
        for one in [open_data(_config(prefix, cross_document=joined), 0, 100)]
    )
    changes = data_changes(before, after)
    assert changes.asked_for == ("data.cross_document: False -> True",) and not changes.silent


@pytest.mark.parametrize(
    ("changes", "language_modelling", "found"),
    [
        ({}, False, "true with pairs or completions"),
        ({"long_documents": LongDocuments.DROP}, True, "true with data.long_documents=drop"),
        ({"sources": {"a": SourceConfig(prefixes=["p"], length_weights={"8K": 2.0})}}, True, "lengths that have weights in data.sources.a"),
    ],
)
def test_what_needs_documents_by_themselves_is_refused(changes: dict[str, Any], language_modelling: bool, found: str) -> None:
    with pytest.raises(ConfigError, match=r"data.cross_document: found ") as error:
        check_cross_document(_config(cross_document=True, **changes), language_modelling=language_modelling)
    assert found in str(error.value)
    assert check_cross_document(_config(**changes), language_modelling=language_modelling) is None


@pytest.mark.parametrize("bad", [100, 250])
def test_a_token_id_outside_the_vocabulary_is_placed(tmp_path: Path, bad: int) -> None:
    prefix = write_corpus(tmp_path / "c", [[1, 2, 3], [4] * 10 + [bad, 5]])
    source = open_data(_config(prefix, max_seq_len=16), 0, 100)
    index = next(i for i, row in enumerate(source.sampler.step(0)) if source.table[int(row)].document == 1)
    assert source.tokens(0, index, 0, 9)[0].tolist() == [4] * 9
    with pytest.raises(DataError) as error:
        source.tokens(0, index, 3, 12)
    assert str(error.value) == (
        f"corpus {prefix} document 1 position 10: found token id {bad}; expected 0 to 99, the model's vocabulary.\n"
        "  Try: prepare the corpus with this model's tokenizer, or set model.vocab_size to the tokenizer's"
    )


def test_a_negative_token_id_is_placed(tmp_path: Path) -> None:
    prefix = write_corpus(tmp_path / "c", [[1, 2, 3]], dtype="int32")
    (tmp_path / "c.bin").write_bytes(np.array([1, -7, 3], dtype="<i4").tobytes())
    with pytest.raises(DataError, match="document 0 position 1: found token id -7; expected 0 to 99"):
        open_data(_config(prefix), 0, 100).tokens(0, 0, 0, 1)


def test_a_document_with_nothing_to_learn_is_named(tmp_path: Path) -> None:
    # A mask on the first token alone teaches nothing either: no position predicts it.
    prefix = write_corpus(tmp_path / "c", [[1, 2, 3], [4, 5]], [[1, 1, 1], [1, 0]])
    source = open_data(_config(prefix), 0, 100)
    with pytest.raises(DataError) as error:
        source.num_target_tokens(0)
    assert str(error.value) == (
        f"corpus {prefix} document 1: found a loss mask that leaves out all 2 tokens; expected at least one token to learn.\n"
        "  Try: prepare the corpus again: efflaunch data prepare INPUT ... --skip-bad leaves such documents out"
    )


def test_a_long_document_with_nothing_to_learn_is_named(tmp_path: Path) -> None:
    prefix = write_corpus(tmp_path / "c", [[1] * 20], [[0] * 20])
    with pytest.raises(DataError, match="document 0: found a loss mask that leaves out all 20 tokens"):
        open_data(_config(prefix), 0, 100)


def test_pieces_that_are_all_prompt_are_left_out(tmp_path: Path) -> None:
    prefix = write_corpus(tmp_path / "c", [list(range(20)), [50, 51]], [[0] * 16 + [1] * 4, [1, 1]])
    source = open_data(_config(prefix), 0, 100)
    pieces = [(source.table[i].document, source.table[i].start) for i in range(len(source.table))]
    assert pieces == [(0, 8), (0, 16), (1, 0)]  # the piece at 8 predicts token 16, the first one that is learnt


def test_describe(tmp_path: Path) -> None:
    prefix = write_corpus(tmp_path / "c", [[1, 2, 3]])
    source = open_data(_config(prefix), 0, 100)
    assert source.describe(0, 0) == f"corpus {prefix} document 0 tokens 0-3"
    assert source.describe(0, 0, 1, 2) == f"corpus {prefix} document 0 tokens 1-2"


def test_the_fingerprint_tells_other_streams_apart(tmp_path: Path) -> None:
    one, two = write_corpus(tmp_path / "c", [[1, 2, 3], [4] * 20]), write_corpus(tmp_path / "d", [[1, 2], [4] * 20])
    base = open_data(_config(one), 0, 100).fingerprint()
    assert open_data(_config(one), 0, 100).fingerprint() == base
    others = [(_config(one), 1), (_config(two), 0), (_config(one, max_seq_len=9), 0), (_config(one, global_batch_tokens=999), 0)]
    assert len({open_data(config, seed, 100).fingerprint() for config, seed in others} | {base}) == 5


def _tokenizer(folder: Path, text: str = "some words to learn from", size: int = 270) -> str:
    train_tokenizer([text], size, folder)
    return str(folder)


def test_a_tokenizer_larger_than_the_model(tmp_path: Path) -> None:
    prefix, tokenizer = write_corpus(tmp_path / "c", [[1, 2]]), _tokenizer(tmp_path / "tok")
    with pytest.raises(DataError) as error:
        open_data(_config(prefix, tokenizer=tokenizer), 0, 260)
    assert str(error.value).startswith(f"tokenizer {tokenizer}: found a vocabulary of 270 tokens; expected at most the model's 260.")
    assert error.value.hint == "model.vocab_size=270, or another tokenizer"
    open_data(_config(prefix, tokenizer=tokenizer), 0, 270)


def _known(prefix: str, **tokenizer: Any) -> None:
    Path(prefix + ".json").write_text(json.dumps({"tokenizer": tokenizer}))


def test_a_corpus_of_a_tokenizer_larger_than_the_model(tmp_path: Path) -> None:
    prefix = write_corpus(tmp_path / "c", [[1, 2]])
    _known(prefix, path="big", vocab_size=300)
    with pytest.raises(DataError, match="tokenizer big: found a vocabulary of 300 tokens; expected at most the model's 270"):
        open_data(_config(prefix), 0, 270)


def test_a_corpus_of_another_tokenizer(tmp_path: Path) -> None:
    prefix, tokenizer = write_corpus(tmp_path / "c", [[1, 2]]), _tokenizer(tmp_path / "tok")
    _known(prefix, path="other", vocab_size=270, vocab_sha256="0" * 64)
    with pytest.raises(DataError, match=r"found tokens of another tokenizer \(other\); expected tokens of data.tokenizer") as error:
        open_data(_config(prefix, tokenizer=tokenizer), 0, 270)
    assert error.value.hint.startswith("data.tokenizer=other, or prepare the corpus again")


@pytest.mark.parametrize("content", [None, "{", "{}"])
def test_a_tokenizer_that_cannot_be_loaded(tmp_path: Path, content: str | None) -> None:
    prefix, path = write_corpus(tmp_path / "c", [[1, 2]]), tmp_path / "tokenizer.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(DataError, match=r"tokenizer .*tokenizer\.json: found nothing that can be loaded \(.+\); expected a tokenizer.json"):
        open_data(_config(prefix, tokenizer=str(path)), 0, 270)


def test_prefixes_and_builtin_exclude_each_other(tmp_path: Path) -> None:
    prefix = write_corpus(tmp_path / "c", [[1, 2]])
    with pytest.raises(ConfigError, match="data: found prefixes and builtin; expected one of prefixes, sources and builtin"):
        open_data(_config(prefix, builtin="python_stdlib"), 0, 270)
    with pytest.raises(ConfigError, match="data: found none of prefixes, sources and builtin; expected one of prefixes"):
        open_data(_config(), 0, 270)
