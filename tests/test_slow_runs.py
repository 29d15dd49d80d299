"""The real training on ranks that stop or are slow: hangs are found and made good, stragglers named."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from efflaunch.launcher.rundir.metrics_reader import MetricsFollower
from efflaunch.launcher.rundir.progress import RunProgress
from efflaunch.tests.launcher.runs import environment
from efflaunch.tests.limits import ENDS_S
from efflaunch.tests.test_real_runs import BASE, make_corpus

SIDE = Path(__file__).resolve().parent / "slow_side.py"


def train(directory: Path, name: str, *overrides: str, **variables: str) -> Path:
    """The directory of a run that went to its end."""
    words = [word for word in BASE if not word.startswith("run.id")]
    command = [sys.executable, str(SIDE), "train", *words, f"run.id={name}", *overrides]
    done = subprocess.run(command, cwd=directory, env=environment() | variables, capture_output=True, text=True, timeout=ENDS_S)
    assert done.returncode == 0, done.stdout + done.stderr
    (directory / f"{name}.out").write_text(done.stdout)
    return directory / "runs" / name


def losses(run_dir: Path) -> dict[int, float]:
    return RunProgress().apply(MetricsFollower(run_dir).read()).losses


@pytest.mark.slow
def test_a_slow_rank_is_named_though_its_group_waits_for_it(tmp_path: Path) -> None:
    """Groups of two: the other member is busy as long, by what it waits, and is not named."""
    make_corpus(tmp_path)
    run_dir = train(tmp_path, "slow", "train.steps=45", "checkpoint.every_steps=null", SLOW_RANK="1", SLOW_S="0.05")
    stragglers = [event for event in MetricsFollower(run_dir).read() if event["event"] == "stragglers"]
    assert stragglers and [row["rank"] for row in stragglers[-1]["ranks"]] == [1] and stragglers[-1]["ranks"][0]["ratio"] > 1.25
    last = [event for event in MetricsFollower(run_dir).read() if event["event"] == "step"][-1]
    assert last["ranks"][1]["own_s"] > last["ranks"][0]["own_s"]
    assert "stragglers, as of step " in (tmp_path / "slow.out").read_text()
    status = [sys.executable, "-m", "efflaunch", "status", str(run_dir)]
    text = subprocess.run(status, cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=ENDS_S).stdout
    assert f"stragglers  rank 1 on {stragglers[-1]['ranks'][0]['host']} " in text
    facts = subprocess.run([*status, "--json"], cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=ENDS_S).stdout
    assert json.loads(facts)["stragglers"] == stragglers[-1]["ranks"]
