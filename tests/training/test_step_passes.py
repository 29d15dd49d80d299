"""Steps of pipeline ranks: when gradients are said to be complete, and what is said when a partner is gone."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from efflaunch.bench.ranks import on_fresh_ranks
from efflaunch.tests.ranks import RankPool
from efflaunch.tests.training.stage_ranks import CPU, prepared, with_a_lost_partner
from efflaunch.training.micro_batches import count_targets
from efflaunch.training.objectives.heads import LanguageModelling
from efflaunch.training.step import backward_step


@pytest.fixture
def pool() -> Iterator[RankPool]:
    with RankPool() as pool:
        yield pool


def steps() -> tuple[list[int], list[int]]:
    """Calls of `on_last` by step, and which micro-batches have a loss here."""
    setup, works = prepared(2)
    count, called = count_targets(works, setup.topology, CPU), []
    for _ in range(2):
        calls: list[int] = []
        shares = backward_step(setup, works, LanguageModelling(count, CPU), on_last=lambda calls=calls: calls.append(1))
        called.append(len(calls))
        setup.model.zero_grad()
    return called, [int(share != 0) for share in shares]


def test_gradients_are_complete_once_a_step_and_the_last_stage_has_the_loss(pool: RankPool) -> None:
    assert pool.run(steps, ranks=2) == [([1, 1], [0, 0, 0, 0]), ([1, 1], [1, 1, 1, 1])]


def test_a_partner_that_dies_in_mid_schedule_is_named_with_the_micro_batch_and_the_stage(tmp_path: Path) -> None:
    said = tmp_path / "said"
    with pytest.raises(RuntimeError, match=r"ranks \[1\] failed"):
        on_fresh_ranks(with_a_lost_partner, 2, said)
    assert "ing gradients of micro-batch" in said.read_text() or "ing activations of micro-batch" in said.read_text()
    assert " rank 1" in said.read_text() and " stage " in said.read_text()
