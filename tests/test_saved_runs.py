"""A run directory and a batch script written before modules got their present places: both still work.

saved_run.tar.xz: a corpus, and a run of two ranks that saved step 5 and was done. saved_script.sbatch: a dry run of launcher=slurm.
"""

from __future__ import annotations

import importlib.util
import json
import re
import tarfile
from pathlib import Path

import pytest

from efflaunch.launcher.commands.checkpoints import CheckpointsRequest, print_checkpoints
from efflaunch.launcher.commands.status import status
from efflaunch.launcher.slurm import job
from efflaunch.tests.test_real_runs import run

GOLDEN = Path(__file__).resolve().parent / "golden"
LOSSES = (4.4367024302482605, 4.423063963651657, 4.388554364442825)
"""Of steps 6 to 8 of the same run, where it was never stopped, by the code that wrote it."""


@pytest.fixture
def place(tmp_path: Path) -> Path:
    with tarfile.open(GOLDEN / "saved_run.tar.xz") as archive:
        archive.extractall(tmp_path, filter="data")
    return tmp_path


def test_a_saved_run_is_read(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    facts = status(place / "runs" / "run")
    assert (facts["state"], facts["step"], facts["steps"]) == ("done", 5, 5)
    request = CheckpointsRequest(verify=True, pin=None, unpin=None, as_json=True)
    assert print_checkpoints(place / "runs" / "run", request) == 0
    assert [row["state"] for row in json.loads(capsys.readouterr().out)] == ["verified"]


def test_a_saved_run_is_resumed(place: Path) -> None:
    run(place, "resume", "runs/run", "train.steps=8", "launcher.grace_s=600")
    events = [json.loads(line) for line in (place / "runs" / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = [event["loss"] for event in events if event["event"] == "step" and event["step"] > 5]
    assert losses == pytest.approx(LOSSES, rel=1e-5)


def test_a_saved_script_calls_what_is_there(capsys: pytest.CaptureFixture[str]) -> None:
    script = (GOLDEN / "saved_script.sbatch").read_text()
    modules = set(re.findall(r"-m (efflaunch[\w.]*)", script))
    assert modules == {"efflaunch.launcher.slurm.job", "efflaunch.launcher.slurm.task"}
    assert all(importlib.util.find_spec(module) for module in modules)
    words = re.findall(r"launcher\.slurm\.job (\w+)", script)
    assert words == ["prepare", "start", "settle"] and job.__doc__ is not None
    assert all(f"\n{word} " in job.__doc__ for word in words)


@pytest.mark.parametrize("module", ["driver", "task", "on_slurm"])
def test_modules_that_saved_ray_requests_call(module: str) -> None:
    assert importlib.util.find_spec(f"efflaunch.launcher.ray.{module}") is not None
