"""Forward passes without a backward give the same through several stages as through one."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from efflaunch.model.chunked_loss import chunked_log_probs
from efflaunch.tests.ranks import RankPool
from efflaunch.tests.training.stage_ranks import LENGTHS, prepared
from efflaunch.training.forward_only import forward_only


@pytest.fixture(scope="module")
def pool() -> Iterator[RankPool]:
    with RankPool() as pool:
        yield pool


def log_probs(stages: int) -> list[np.ndarray]:
    setup, works = prepared(stages)
    scored = forward_only(setup, works, lambda work: chunked_log_probs)
    assert [work for work, _ in scored] in (works, [])
    return [np.array(values) for _, values in scored]


def test_scores_do_not_depend_on_the_stages(pool: RankPool) -> None:
    (whole,) = pool.run(log_probs, 1, ranks=1)
    first, last = pool.run(log_probs, 2, ranks=2)
    assert first == [] and [len(values) for values in last] == list(LENGTHS)
    for mine, theirs in zip(last, whole, strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-5, atol=1e-6)
