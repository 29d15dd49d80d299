"""How an agent starts its ranks: forked on a CPU, spawned where they have GPUs, and a run is the same either way."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from efflaunch.launcher.agent.agent import start_method
from efflaunch.launcher.config.compose import compose
from efflaunch.launcher.rundir.metrics_reader import MetricsFollower
from efflaunch.launcher.rundir.progress import RunProgress
from efflaunch.tests.launcher.runs import environment
from efflaunch.tests.limits import ENDS_S
from efflaunch.tests.test_real_runs import BASE, make_corpus

SIDE = Path(__file__).resolve().parents[1] / "spawn_side.py"


def losses(directory: Path, script: list[str], *words: str) -> dict[int, float]:
    """The losses of a run to its end."""
    directory.mkdir(exist_ok=True)
    make_corpus(directory)
    command = [sys.executable, *script, *words]
    done = subprocess.run(command, cwd=directory, env=environment(), capture_output=True, text=True, timeout=ENDS_S)
    assert done.returncode == 0, done.stdout + done.stderr
    return RunProgress().apply(MetricsFollower(directory / "runs" / "run").read()).losses


def test_a_process_with_cuda_is_not_forked() -> None:
    assert start_method(compose(["+experiment=quickstart"])) == "fork"
    assert start_method(compose(["+experiment=llama8b_1M"])) == "spawn"


@pytest.mark.slow
def test_spawned_ranks_train_save_and_resume_as_forked_ones_do(tmp_path: Path) -> None:
    words = (*BASE, "parallel.sequence=adaptive", "parallel.probe_s=0", "checkpoint.every_steps=2")
    spawned = losses(tmp_path / "spawned", [str(SIDE)], "train", *words, "train.steps=2")
    more = losses(tmp_path / "spawned", [str(SIDE)], "resume", "runs/run", "train.steps=4")
    forked = losses(tmp_path / "forked", ["-m", "efflaunch"], "train", *words, "train.steps=4")
    assert sorted(spawned) == [1, 2] and more == forked
    for rank in (0, 1):
        assert "multiprocessing.spawn" in (tmp_path / "spawned" / "runs" / "run" / f"spawned-{rank}").read_text()
