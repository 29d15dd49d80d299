"""Documents of an evaluation that are trained on too."""

from __future__ import annotations

import pytest

from efflaunch.tests.data.corpora import write_corpus
from efflaunch.training.data.indexed import IndexedCorpus
from efflaunch.training.evaluation import overlap
from efflaunch.training.evaluation.overlap import overlap_notes, shared_documents

LONG = [*range(200)]


@pytest.fixture
def training(tmp_path):
    return IndexedCorpus(write_corpus(tmp_path / "train", [[1, 2, 3], [4, 5], LONG, [9, 9, 9]]))


def held_out(tmp_path, documents):
    return IndexedCorpus(write_corpus(tmp_path / "held", documents))


def test_equal_documents_are_found(tmp_path, training):
    shared = shared_documents(held_out(tmp_path, [[7, 7, 7], LONG, [4, 5]]), [training])
    assert shared is not None and shared.documents == (1, 2) and shared.is_complete
    assert shared.first == f"document 2 of {training.prefix}"


def test_equal_lengths_or_beginnings_are_not_enough(tmp_path, training):
    assert shared_documents(held_out(tmp_path, [[3, 2, 1], [*LONG[:-1], 7], [*LONG, 1]]), [training]) is None


def test_the_note_names_both(tmp_path, training):
    (note,) = overlap_notes([("web", held_out(tmp_path, [[1, 2, 3], [8]]))], [training])
    assert note.startswith("eval.corpora.web shares 1 of 2 documents with training (document 0 is document 0 of ")


def test_a_corpus_too_large_is_sampled_and_said_so(tmp_path, monkeypatch):
    monkeypatch.setattr(overlap, "MOST_COMPARED", 2)
    training = IndexedCorpus(write_corpus(tmp_path / "train", [[1, 2, 3], [2, 3, 4], [3, 4, 5], [4, 5, 6]]))
    (note,) = overlap_notes([("web", held_out(tmp_path, [[1, 2, 3], [2, 3, 4]]))], [training])
    assert "shares 1 of 2" in note and "of those compared" in note
