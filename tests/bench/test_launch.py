"""The launcher benchmark in miniature, and what it makes of its figures. Nothing is timed here."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from efflaunch.bench import launch, report
from efflaunch.bench.launch_places import CONTESTANTS, Contestant


def test_medians_minima_and_differences_within_a_round() -> None:
    lives = {
        "elastic": [{"start_s": 10.0, "stop_s": 1.0}, {"start_s": 20.0, "stop_s": 1.0}, {"start_s": 12.0, "stop_s": 1.0}],
        "slurm": [{"start_s": 13.0, "node_death_s": 30.0}, {"start_s": 21.0}, {"start_s": 14.0}],
    }
    measured = launch.summary(lives)
    assert measured["elastic"] == {"start_s": {"median": 12.0, "min": 10.0}, "stop_s": {"median": 1.0, "min": 1.0}}
    assert measured["slurm"] == {
        "start_s": {"median": 14.0, "min": 13.0, "over_elastic": 2.0},
        "node_death_s": {"median": 30.0, "min": 30.0},
    }


def test_what_is_not_here_is_skipped_with_the_reason() -> None:
    assert Contestant(name="launcher=condor", kind="condor").why_not() == "no launcher=condor in this version"
    assert CONTESTANTS["elastic"].why_not() is None and CONTESTANTS["local"].why_not() is None


def test_a_life_of_both_and_the_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(CONTESTANTS, "slurm", Contestant(name="launcher=condor", kind="condor"))
    results = tmp_path / "results"
    words = ["--rounds", "1", "--no-warm-up", "--contestants", "elastic,local,slurm", "model.num_layers=1", "model.hidden_size=32"]
    assert launch.main(["--json", str(results / "launch.json"), "--folder", str(tmp_path), *words]) == 0
    measured = json.loads((results / "launch.json").read_text())
    assert measured["skipped"] == {"slurm": "no launcher=condor in this version"} and not measured["failures"]
    assert set(measured["contestants"]["local"]) == {"start_s", "rank_death_s", "stop_s"} == set(measured["contestants"]["elastic"])
    assert all(value["median"] > 0 for row in measured["contestants"].values() for value in row.values())
    assert report.main([str(results), str(tmp_path / "page.md")]) == 0
    page = (tmp_path / "page.md").read_text()
    assert "## Launchers" in page and "| `launcher=local` |" in page and "slurm was not measured: no launcher=condor" in page
    assert not list(tmp_path.glob("efflaunch-bench-*"))
