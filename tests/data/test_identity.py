"""Replaced corpora are noticed and named; what follows from settings that were changed is told apart."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from efflaunch.errors import DataError
from efflaunch.training.data import identity
from efflaunch.training.data.config import DataChanged, DataConfig, SourceConfig
from efflaunch.training.data.identity import block_starts, check_data_changes, corpus_content, data_changes, data_identity, settings_of
from efflaunch.training.data.indexed import IndexedCorpus
from efflaunch.training.data.scores import corpus_digest

SETTINGS = {"train.seed": 0, "data.prefixes": ["c"], "data.builtin": None, "data.vocab_size": None, "data.max_seq_len": 8}


def make(prefix: Path, tokens: list[int], lengths: list[int], mask: list[int] | None = None, dtype: str = "uint16") -> IndexedCorpus:
    from efflaunch.training.data.indexed import DTYPE_NAMES, HEADER, MAGIC

    code = next(code for code, name in DTYPE_NAMES.items() if name == dtype)
    width = np.dtype(dtype).itemsize
    starts = np.concatenate([[0], np.cumsum(lengths)])
    head = HEADER.pack(MAGIC, 1, code, len(lengths), len(lengths) + 1)
    body = (
        np.array(lengths, "<i4").tobytes()
        + (starts[:-1] * width).astype("<i8").tobytes()
        + np.arange(len(lengths) + 1, dtype="<i8").tobytes()
    )
    prefix.with_name(prefix.name + ".idx").write_bytes(head + body)
    prefix.with_name(prefix.name + ".bin").write_bytes(np.array(tokens, dtype).tobytes())
    if mask is not None:
        prefix.with_name(prefix.name + ".mask.bin").write_bytes(bytes(mask))
    return IndexedCorpus(str(prefix))


def saved(corpora: list[IndexedCorpus], stream: str | None = "s", **settings: Any) -> dict[str, Any]:
    """As a checkpoint has it."""
    keys = {key.replace("_", ".", 1): value for key, value in settings.items()}
    identity: dict[str, Any] = json.loads(json.dumps(data_identity(corpora, SETTINGS | keys, stream)))
    return identity


def test_the_same_tokens_are_the_same_wherever_and_however_they_lie(tmp_path: Path) -> None:
    one = make(tmp_path / "a", [1, 2, 3, 4, 5], [2, 3])
    two = make(tmp_path / "b", [1, 2, 3, 4, 5], [2, 3], dtype="int32")
    assert corpus_content(one) == corpus_content(two) and corpus_content(one)["mask"] is None
    moved = data_changes(saved([one]), saved([two], data_prefixes=["elsewhere/b"]))
    assert moved.lines == ()


@pytest.mark.parametrize(
    ("tokens", "lengths", "mask", "parts"),
    [
        ([1, 2, 3, 4, 6], [2, 3], None, "tokens"),
        ([1, 2, 3, 4, 5], [3, 2], None, "document lengths"),
        ([1, 2, 3, 4, 5], [2, 3], [0, 1, 0, 1, 1], "loss mask"),
        ([5, 4, 3, 2, 1], [1, 4], [1, 1, 1, 1, 1], "document lengths, tokens, loss mask"),
    ],
)
def test_a_replaced_corpus_is_refused_and_said(
    tmp_path: Path, tokens: list[int], lengths: list[int], mask: list[int] | None, parts: str
) -> None:
    before = saved([make(tmp_path / "c", [1, 2, 3, 4, 5], [2, 3])])
    changes = data_changes(before, saved([make(tmp_path / "c", tokens, lengths, mask)], "other"))
    assert changes.silent == (f"corpus {tmp_path}/c: other {parts}",)
    with pytest.raises(DataError, match=rf"(?s)step 7: found something else now: corpus .*: other {parts}; .*data.changed=accept"):
        check_data_changes(changes, DataChanged.REFUSE, 7)
    check_data_changes(changes, DataChanged.ACCEPT, 7)
    with pytest.raises(DataError):
        # A setting that was changed too does not hide it.
        check_data_changes(data_changes(before, saved([make(tmp_path / "c", tokens, lengths, mask)], train_seed=1)), DataChanged.REFUSE, 7)


def test_what_settings_ask_for_is_said_and_not_refused(tmp_path: Path) -> None:
    corpus, other = make(tmp_path / "c", [1, 2, 3, 4, 5], [2, 3]), make(tmp_path / "d", [9, 8], [2])
    seed = data_changes(saved([corpus]), saved([corpus], "t", train_seed=1))
    assert (seed.asked_for, seed.silent) == (("train.seed: 0 -> 1",), ())
    named = data_changes(saved([corpus]), saved([other], "t", data_prefixes=["d"]))
    assert named.silent == () and named.asked_for[0] == "data.prefixes: ['c'] -> ['d']" and len(named.asked_for) == 2
    more = data_changes(saved([corpus]), saved([corpus, other], "t", data_prefixes=["c", "d"]))
    assert more.silent == () and "2 corpora, not 1" in more.asked_for


def test_weights_and_sources_may_change(tmp_path: Path) -> None:
    corpus, other = make(tmp_path / "c", [1, 2, 3, 4, 5], [2, 3]), make(tmp_path / "d", [9, 8], [2])

    def settings(*names: str, weight: float = 1.0) -> dict[str, Any]:
        sources = {name: SourceConfig(prefixes=[name], weight=weight) for name in names}
        return settings_of(DataConfig(name="t", sources=sources, max_seq_len=8, global_batch_tokens=8), 0)

    before = data_identity([corpus], settings("c"), "s")
    (line,) = data_changes(before, data_identity([corpus], settings("c", weight=2.0), "s")).asked_for
    assert line.startswith("data.sources' weights: {'c': {'weight': 1.0,")
    more = data_changes(before, data_identity([corpus, other], settings("c", "d"), "t"))
    assert more.silent == () and more.asked_for[0] == "data.sources: {'c': ['c']} -> {'c': ['c'], 'd': ['d']}"


def test_the_sequences_alone_and_what_earlier_versions_hold(tmp_path: Path) -> None:
    corpus = make(tmp_path / "c", [1, 2, 3, 4, 5], [2, 3])
    assert data_changes(saved([corpus]), saved([corpus], "other")).silent == ("the sequences that are cut from the corpora",)
    assert data_changes(saved([corpus]), saved([corpus], None)).lines == ()
    assert data_changes("s", saved([corpus])).lines == () and data_changes("older", saved([corpus])).silent == ()
    assert data_changes("older", saved([corpus])).asked_for and data_changes(None, saved([corpus])).lines == ()


def test_large_columns_are_sampled_from_end_to_end(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(identity, "SAMPLE_BLOCKS", 4)
    monkeypatch.setattr(identity, "BLOCK_NUMBERS", 10)
    assert block_starts(40) == [0, 10, 20, 30] and block_starts(35) == [0, 10, 20, 30] and block_starts(0) == []
    assert block_starts(1000) == [0, 330, 660, 990]
    base = list(range(100))
    whole = corpus_content(make(tmp_path / "c", base, [100]))
    for at in (0, 35, 99):
        changed = [*base[:at], 7777, *base[at + 1 :]]
        assert corpus_content(make(tmp_path / "c", changed, [100])) != whole


def test_scores_of_a_replaced_corpus_are_not_taken(tmp_path: Path) -> None:
    before = corpus_digest(make(tmp_path / "c", [1, 2, 3, 4, 5], [2, 3]))
    assert corpus_digest(make(tmp_path / "c", [1, 2, 3, 4, 6], [2, 3])) != before
    assert corpus_digest(make(tmp_path / "c", [1, 2, 3, 4, 5], [2, 3])) == before
