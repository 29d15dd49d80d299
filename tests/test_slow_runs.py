"""The real training on ranks that stop or are slow: hangs are found and made good, stragglers named."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from efflaunch.launcher.rundir.metrics_reader import MetricsFollower
from efflaunch.launcher.rundir.progress import RunProgress
from efflaunch.launcher.rundir.state import read_state
from efflaunch.tests.launcher.runs import environment
from efflaunch.tests.test_real_runs import BASE, make_corpus

pytestmark = pytest.mark.timeout(600)
SIDE = Path(__file__).resolve().parent / "slow_side.py"


def train(directory: Path, name: str, *overrides: str, **variables: str) -> Path:
    """The directory of a run that went to its end."""
    words = [word for word in BASE if not word.startswith("run.id")]
    command = [sys.executable, str(SIDE), "train", *words, f"run.id={name}", *overrides]
    done = subprocess.run(command, cwd=directory, env=environment() | variables, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stdout + done.stderr
    (directory / f"{name}.out").write_text(done.stdout)
    return directory / "runs" / name


def losses(run_dir: Path) -> dict[int, float]:
    return RunProgress().apply(MetricsFollower(run_dir).read()).losses


def test_a_stopped_rank_costs_nothing_but_time(tmp_path: Path) -> None:
    """The loss curve is that of a run nothing happened to, bit by bit."""
    make_corpus(tmp_path)
    soon = ("train.steps=12", "launcher.hang_factor=2", "launcher.hang_min_s=10", "launcher.hang_long_s=120")
    undisturbed = train(tmp_path, "undisturbed", *soon)
    hung = train(tmp_path, "hung", *soon, STOP_RANK="1", STOP_STEP="8")
    assert losses(hung) == losses(undisturbed) and len(losses(hung)) == 12
    state = read_state(hung)
    assert state is not None and len(state.attempts) == 2
    failure = state.attempts[0].failure
    assert failure is not None and failure.rank == 1 and "is stopped and cannot run (reading data, after step 7)" in failure.message
    for rank in (0, 1):
        assert (hung / "logs" / "attempt-1" / f"stacks-{rank}.txt").is_file()
    waiting = (hung / "logs" / "attempt-1" / "stacks-0.txt").read_text()
    assert "backward_step" in waiting and "training/trainer.py" in waiting


@pytest.mark.slow
def test_a_slow_rank_is_named_though_its_group_waits_for_it(tmp_path: Path) -> None:
    """Groups of two: the other member is busy as long, by what it waits, and is not named."""
    make_corpus(tmp_path)
    run_dir = train(tmp_path, "slow", "train.steps=45", "checkpoint.every_steps=null", SLOW_RANK="1", SLOW_S="0.05")
    told = [event for event in MetricsFollower(run_dir).read() if event["event"] == "stragglers"]
    assert told and [row["rank"] for row in told[-1]["ranks"]] == [1] and told[-1]["ranks"][0]["ratio"] > 1.25
    last = [event for event in MetricsFollower(run_dir).read() if event["event"] == "step"][-1]
    assert last["ranks"][1]["own_s"] > last["ranks"][0]["own_s"]
    assert "stragglers, as of step " in (tmp_path / "slow.out").read_text()
    status = [sys.executable, "-m", "efflaunch", "status", str(run_dir)]
    text = subprocess.run(status, cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=120).stdout
    assert f"stragglers  rank 1 on {told[-1]['ranks'][0]['host']} " in text
    facts = subprocess.run([*status, "--json"], cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=120).stdout
    assert json.loads(facts)["stragglers"] == told[-1]["ranks"]
