"""Whether a stop will end in time: by what a run has measured, and before that by the plan."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from efflaunch.launcher.backend import Launch, grace_note
from efflaunch.launcher.config.compose import compose
from efflaunch.launcher.config.ledger import plan
from efflaunch.launcher.stop_forecast import Forecast, GraceWatch, measured, planned


def step(seconds: float) -> dict[str, Any]:
    return {"event": "step", "step": 1, "step_s": seconds}


def save(seconds: float) -> dict[str, Any]:
    return {"event": "checkpoint", "step": 1, "save_s": seconds}


START = {"event": "start", "step": 0}


def test_the_longest_step_and_the_newest_save() -> None:
    assert measured([START, step(5.0), step(2.0)], 1.0) is None
    forecast = measured([START, step(50.0), step(2.0), step(3.0), save(40.0), step(1.0), save(10.0)], 12.0)
    assert forecast == Forecast(step_s=3.0, save_s=10.0, grace_s=12.0, source="measured in this run")
    assert forecast.needed_s == 13.0 and not forecast.fits and measured([START, step(2.0), save(10.0)], 12.0).fits
    restarted = measured([START, step(9.0), step(8.0), save(1.0), START, step(4.0)], 9.0)
    assert restarted.step_s == 4.0 and restarted.save_s == 1.0


def test_what_is_said() -> None:
    text = str(measured([START, step(100.0), save(30.0)], 120.0))
    assert text.startswith("a stop may not end in time: up to 1 min 40 s for a step and 30 s for a save (measured in this run)")
    assert text.endswith("launcher.grace_s=120; try launcher.grace_s=195")
    assert "a stop takes up to 1.00 s for a step and 2.00 s for a save" in str(measured([START, step(1.0), save(2.0)], 9.0))


def test_news_come_once_and_again_when_it_gets_worse() -> None:
    watch = GraceWatch(10.0)
    assert watch.add([START, step(1.0), step(1.0)]).news() is None
    assert "up to 1.00 s for a step and 10 s for a save" in str(watch.add([save(10.0)]).news()) and watch.add([step(1.0)]).news() is None
    assert watch.add([save(11.0)]).news() is None and watch.add([save(20.0)]).news() is not None
    assert watch.add([save(1.0)]).news() is None


def test_before_the_first_checkpoint_by_the_plan(tmp_path: Path) -> None:
    """Weights and two moments in float32, written by two nodes at once; without cluster.storage_bandwidth nothing is said."""
    words = ["+experiment=llama8b_1M", "launcher=slurm", "cluster=h100_80g_8", "cluster.num_nodes=2"]
    assert planned(compose(words)) is None
    config = compose([*words, "cluster.storage_bandwidth=1e9", "launcher.grace_s=30"])
    forecast = planned(config)
    ledger = plan(config)
    assert forecast is not None and forecast.save_s == pytest.approx(ledger.inputs.parameters * 12 / 2e9)
    assert forecast.step_s == ledger.timing.step_s and not forecast.fits
    launch = Launch(config=config, run_dir=tmp_path)
    assert grace_note(launch) == str(forecast) and "planned: " in str(forecast)
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(event) + "\n" for event in (START, step(1.0), save(2.0))))
    assert grace_note(launch) == ""
