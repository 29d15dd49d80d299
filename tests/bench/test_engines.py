"""The engines' headline figures are medians of ratios within a round, and peaks over peaks."""

from __future__ import annotations

import pytest

from efflaunch.bench.engines import PAIRS, summary


def test_figures_compare_each_engine_with_itself() -> None:
    seconds = {"ours_deepspeed": [1.0, 2.0, 4.0], "plain_deepspeed": [2.0, 2.0, 6.0], "ours_torch": [1.0] * 3, "plain_fsdp": [0.5] * 3}
    peaks = {"ours_deepspeed": 60, "plain_deepspeed": 100, "ours_torch": 50, "plain_fsdp": 40}
    figures = summary({"seconds": seconds, "peak_bytes": peaks})
    assert figures == pytest.approx(
        {"vs_plain_deepspeed": 1.5, "peak_vs_plain_deepspeed": 0.6, "vs_plain_fsdp": 0.5, "peak_vs_plain_fsdp": 1.25}
    )
    assert {name for pair in PAIRS.values() for name in pair} == set(seconds)
