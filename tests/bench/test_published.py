"""Published runs as their authors ran them: planned, compared, and summed up with drafts apart."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from efflaunch.bench.published import AIMS, LIMITS, RUNS, Published, configuration, limit_row, main, row, summary
from efflaunch.launcher.config.compose import compose
from efflaunch.memory.config import ActivationPlace


@cache
def planned_row(run: Published) -> dict[str, Any]:
    """Each run is planned once for all tests."""
    return row(run)


def test_the_cases_that_are_promised_are_there() -> None:
    told = {(run.model, run.gpus, run.step_s, run.memory_bytes) for run in RUNS}
    assert {
        ("qwen3_8b", 8, 380.0, 56.2e9), ("qwen3_32b", 8, 1295.0, 60.8e9), ("qwen3_30b_a3b", 8, 483.0, 46.0e9),
    } <= told  # fmt: skip
    assert all(run.source.startswith("https://") and run.left_out for run in RUNS)
    assert len(RUNS) >= 10 and {run.kernel for run in RUNS} == {"cudnn", "sdpa", "fa2", "fa3"}


def test_predictions_are_near_what_was_published() -> None:
    """The aims of the file: of times the median within 10 % and the worst within 25 %, drafts too; of memory the same."""
    found = summary([planned_row(run) for run in RUNS])
    for what in ("time_error", "memory_error", "time_error_drafts"):
        median, worst = found[f"median_{what}"], found[f"worst_{what}"]
        assert median is not None and worst is not None and median <= AIMS["median"] and worst <= AIMS["worst"]


@pytest.mark.parametrize("run", RUNS, ids=lambda run: run.name)
def test_each_is_planned_under_its_own_policy(run) -> None:  # type: ignore[no-untyped-def]
    config = compose(configuration(run))
    assert config.memory.layer_input in (ActivationPlace.HOST, ActivationPlace.KEEP)
    assert config.memory.activations is config.memory.attention_output is ActivationPlace.RECOMPUTE
    assert config.cluster.num_nodes * config.cluster.ranks_per_node == run.gpus
    figures = planned_row(run)
    if run.step_s is None:
        assert figures["time_error"] is None and figures["memory_error"] == figures["predicted_bytes"] / run.memory_bytes - 1.0
    else:
        assert figures["time_error"] == figures["predicted_s"] / run.step_s - 1.0 and 0.2 < figures["published_utilisation"] < 0.5
    assert figures["predicted_bytes"] >= figures["tiled_bytes"] > 0 and 0.7 < figures["attention_share"] < 1.0


@pytest.mark.parametrize("run", LIMITS, ids=lambda run: run.name)
def test_what_ran_elsewhere_fits_by_our_ledger(run) -> None:  # type: ignore[no-untyped-def]
    """Under its authors' policy, on their GPUs; they say neither seconds nor bytes, so no error is made of it."""
    assert run.step_s is run.memory_bytes is None and run.left_out and not run.is_draft
    figures = limit_row(run)
    assert figures["fits"] and figures["predicted_bytes"] < figures["device_bytes"]
    assert 0.3 < figures["predicted_utilisation"] < 0.7


def test_drafts_are_summed_up_apart() -> None:
    rows = [
        {"time_error": 0.1, "memory_error": None, "is_draft": False},
        {"time_error": -0.3, "memory_error": 0.05, "is_draft": False},
        {"time_error": 9.0, "memory_error": 9.0, "is_draft": True},
    ]
    assert summary(rows) == {
        "median_time_error": 0.2, "worst_time_error": 0.3, "median_memory_error": 0.05, "worst_memory_error": 0.05,
        "median_time_error_drafts": 9.0, "worst_time_error_drafts": 9.0,
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
