"""Pipelines that run: the product's actions on ranks that sleep, and a small Llama beside torch's, end to end in tiny sizes."""

from __future__ import annotations

import pytest

from efflaunch.bench.peers.torch_pipeline import MICRO_BATCHES, lengths_of
from efflaunch.bench.pipeline_ranks import against_torch, seconds_of, throttled


def test_every_order_runs_with_the_messages_it_plans() -> None:
    result = throttled(2, 4, 0.002, 1)
    assert [row["order"] for row in result["rows"]] == ["1f1b", "gpipe", "interleaved", "zero_bubble"]
    # How much longer is the machine's business; shorter it cannot be.
    assert all(row["measured_s"] >= row["predicted_s"] for row in result["rows"])


def test_sleeping_micro_batches_are_unequal() -> None:
    seconds = seconds_of(8, 0.05)
    assert sum(seconds) == pytest.approx(8 * 0.05) and max(seconds) == pytest.approx(4 * min(seconds))


def test_padded_micro_batches_have_a_long_tail() -> None:
    assert lengths_of(64, "equal") == (64,) * MICRO_BATCHES
    assert max(lengths_of(64, "padded")) == 64 and sum(lengths_of(64, "padded")) < 64 * MICRO_BATCHES // 2


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["equal", "padded"])
def test_both_make_their_steps(kind: str) -> None:
    result = against_torch(16, kind, 1)
    assert result["speed_over_torch"] > 0 and result["tokens"] == sum(lengths_of(16, kind))
