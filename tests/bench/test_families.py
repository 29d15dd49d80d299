"""The benchmark of families on two of them, tiny, and its headline figures."""

from __future__ import annotations

import json
from pathlib import Path

from efflaunch.bench import families
from efflaunch.model.config import Family


def test_both_sides_of_a_family_are_measured(tmp_path: Path) -> None:
    file = tmp_path / "families.json"
    assert families.main(["--json", str(file), "--only", "cohere2", "--tokens", "512", "--rounds", "1"]) == 0
    result = json.loads(file.read_text())
    (row,) = result["rows"]
    assert row["name"] == "cohere2" and 0 < row["error"] < 1e-10 and min(row["our_s"], row["their_s"]) > 0
    assert row["our_bytes"] > 0 and result["most_memory"] == row["our_bytes"] / row["their_bytes"]


def test_headline_figures() -> None:
    first = {"error": 1e-15, "our_s": 2.0, "their_s": 3.0, "our_bytes": 60, "their_bytes": 100}
    second = {"error": 1e-14, "our_s": 2.0, "their_s": 2.5, "our_bytes": 50, "their_bytes": 100}
    assert families.summary([first, second]) == {"worst_error": 1e-14, "least_speedup": 1.25, "most_memory": 0.6}


def test_which_families_are_run() -> None:
    chosen = families.dense_families()
    assert Family.LLAMA in chosen and Family.STABLELM in chosen and Family.MIXTRAL not in chosen
    assert families.model_of(Family.OLMO3, families.Sizes())["sliding_window"] == families.WINDOW
