"""An evaluation that is told to stop, and what it reads."""

from __future__ import annotations

import pytest

from efflaunch.tests.parity.evaluation_side import DOCUMENTS, corpus, opened, reference, stop_after
from efflaunch.tests.ranks import RankPool
from efflaunch.training.data.indexed import IndexedCorpus


@pytest.fixture(scope="module")
def pool():
    with RankPool() as pool:
        yield pool


@pytest.mark.parametrize("steps", [1, 3])
def test_a_stopped_evaluation_says_nothing(pool, tmp_path, steps):
    _, weights = reference("llama")
    answers = pool.run(stop_after, {"family": "llama"}, ("static", 2, 2, 1), weights, corpus(tmp_path, False), steps, ranks=2)
    assert answers[0] == answers[1]
    stopped, asked = answers[0]
    assert stopped and len(asked) == steps
    total = sum(windows.num_tokens for windows in opened(str(tmp_path / "held")).passes.values())
    assert asked[-1][0] < total == asked[-1][1]


def test_the_small_corpus_is_what_tests_take_it_for(tmp_path):
    assert IndexedCorpus(corpus(tmp_path, True)).lengths.tolist() == list(DOCUMENTS)
