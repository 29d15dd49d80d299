"""Plans of experts on real gloo ranks: they meet in the same collectives and reduce every gradient once. Times are only written down."""

from __future__ import annotations

import json
from pathlib import Path

from efflaunch.bench.experts_throttled import SCHEDULES, main, summary


def test_ranks_execute_every_schedule(tmp_path: Path) -> None:
    file = tmp_path / "r.json"
    assert main(["--json", str(file), "--layers", "1", "--scale", "0.01", "--rounds", "1"]) == 0
    result = json.loads(file.read_text())
    assert result["benchmark"] == "experts_throttled" and [row["schedule"] for row in result["rows"]] == list(SCHEDULES)
    assert all(row["measured_s"] > 0 < row["predicted_s"] and row["tasks"] >= 20 for row in result["rows"])
    predicted = {row["schedule"]: row["predicted_s"] for row in result["rows"]}
    assert predicted["ours"] == min(predicted.values()) and predicted["tutel"] < predicted["sequential"]


def test_the_headline_figures() -> None:
    rows = [
        {"schedule": "a", "predicted_s": 1.0, "measured_s": 1.25},
        {"schedule": "b", "predicted_s": 2.0, "measured_s": 1.0},
        {"schedule": "c", "predicted_s": 4.0, "measured_s": 4.0},
    ]
    assert summary(rows) == {"worst_error": 0.5, "inverted_pairs": [("a", "b")]}
