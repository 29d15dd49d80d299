"""Published runs as their authors ran them: planned, compared, and summed up without drafts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from efflaunch.bench.published import RUNS, configuration, main, row, summary
from efflaunch.launcher.config.compose import compose
from efflaunch.memory.config import ActivationPlace


def test_the_cases_that_are_promised_are_there() -> None:
    told = {(run.model, run.gpus, run.step_s, run.memory_bytes) for run in RUNS}
    assert {
        ("qwen3_8b", 8, 380.0, 56.2e9), ("qwen3_32b", 8, 1295.0, 60.8e9), ("qwen3_30b_a3b", 8, 483.0, 46.0e9),
    } <= told  # fmt: skip
    assert all(run.source.startswith("https://") and run.left_out for run in RUNS)


@pytest.mark.parametrize("run", RUNS, ids=lambda run: run.name)
def test_each_is_planned_under_its_own_policy(run) -> None:  # type: ignore[no-untyped-def]
    config = compose(configuration(run))
    assert config.memory.layer_input is ActivationPlace.HOST and config.memory.activations is ActivationPlace.RECOMPUTE
    assert config.cluster.num_nodes * config.cluster.ranks_per_node == run.gpus
    figures = row(run)
    assert figures["time_error"] == figures["predicted_s"] / run.step_s - 1.0
    assert figures["predicted_bytes"] >= figures["tiled_bytes"] > 0 and 0.2 < figures["published_utilisation"] < 0.5
    assert 0.9 < figures["attention_share"] < 1.0


def test_drafts_are_in_no_summary() -> None:
    rows = [
        {"time_error": 0.1, "memory_error": None, "is_draft": False},
        {"time_error": -0.3, "memory_error": 0.05, "is_draft": False},
        {"time_error": 9.0, "memory_error": 9.0, "is_draft": True},
    ]
    assert summary(rows) == {
        "median_time_error": 0.2, "worst_time_error": 0.3, "median_memory_error": 0.05, "worst_memory_error": 0.05,
    }  # fmt: skip
    assert summary(rows[2:])["worst_time_error"] is None


def test_it_writes_what_it_found(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "published.json"
    assert main(["--json", str(file), "--only", "A3B"]) == 0
    (found,) = json.loads(file.read_text())["rows"]
    assert found["model"] == "qwen3_30b_a3b" and found["gpus"] == 8
    assert f"published 483 s ({found['time_error']:+.1%})" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["--json", str(file), "--only", "nobody's"])
