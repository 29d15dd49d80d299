"""The benchmark of a mixture of experts: contestants compute the same, and its figures are ratios of what was measured."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from efflaunch.bench.experts_step import WAYS, main, summary
from efflaunch.bench.report import section


def test_it_runs_and_its_section_says_what_was_measured(tmp_path: Path) -> None:
    file = tmp_path / "experts_step.json"
    assert main(["--json", str(file), "--tokens", "320", "--rounds", "1"]) == 0
    result = json.loads(file.read_text())
    assert set(result["peak_bytes"]) == set(WAYS) == set(result["rounds"][0])
    assert result["peak_bytes"]["ours, recompute"] < result["peak_bytes"]["eager, checkpointing"]
    text = section(result)
    assert "320 tokens" in text and f"{result['peak_over_checkpointing']:.2f} (aim" in text and all(f"| {way} |" in text for way in WAYS)


def test_figures_are_medians_of_the_same_round() -> None:
    rounds = [dict.fromkeys(WAYS, 1.0) | {"ours, keep": ours, "grouped_mm": theirs} for ours, theirs in ((1, 2), (2, 2), (4, 12))]
    figures = summary(rounds, dict.fromkeys(WAYS, 100) | {"ours, recompute": 25, "eager, checkpointing": 50})
    assert figures["speed_over_grouped"] == pytest.approx(2.0) and figures["peak_over_checkpointing"] == 0.5
