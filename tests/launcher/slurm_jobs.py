"""Runs handed to a real SLURM (tests/slurm_cluster.py), for tests."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from efflaunch.launcher.metrics_file import MetricsFollower, newest_step
from efflaunch.launcher.progress import Progress
from efflaunch.launcher.slurm.files import submitted_job
from efflaunch.launcher.state import RunState, read_state
from efflaunch.tests.launcher.runs import HERE, environment
from efflaunch.tests.slurm_cluster import TIMEOUT_S, SlurmCluster, wait_until

FAKE = ("+experiment=quickstart", "cluster.ranks_per_node=2", "checkpoint.every_steps=5", "launcher=slurm", "cluster.num_nodes=2")
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")


@dataclass
class Job:
    """One run handed to SLURM."""

    cluster: SlurmCluster
    run_dir: Path

    @property
    def number(self) -> str:
        number = submitted_job(self.run_dir)
        assert number is not None
        return number

    def end(self) -> str:
        """SLURM's word for how it ended."""
        return self.cluster.wait_for(self.number, *ENDED)

    def wait_for_step(self, step: int) -> None:
        """Until the run got so far; fails where the job ends before."""

        def reached() -> bool:
            state = self.cluster.job_state(self.number)
            assert state not in ENDED or newest_step(self.run_dir) >= step, self.output()
            return newest_step(self.run_dir) >= step

        wait_until(reached, f"step {step}")

    def state(self) -> RunState:
        state = read_state(self.run_dir)
        assert state is not None
        return state

    def output(self) -> str:
        return "".join(path.read_text() for path in sorted((self.run_dir / "slurm").glob("*.out")))

    def losses(self) -> dict[int, float]:
        return losses(self.run_dir)


def losses(run_dir: Path) -> dict[int, float]:
    return Progress().apply(MetricsFollower(run_dir).read()).losses


def efflaunch(cluster: SlurmCluster, place: Path, *words: str, fake: bool = True, expect: int = 0, **variables: str) -> str:
    """What an efflaunch command prints; with the fake training function unless told otherwise."""
    command = [sys.executable, str(HERE / "drive.py")] if fake else [sys.executable, "-m", "efflaunch"]
    variables = {**environment(), **cluster.environment, "PYTHONPATH": environment()["PYTHONPATH"], **variables}
    done = subprocess.run([*command, *words], cwd=place, env=variables, capture_output=True, text=True, timeout=TIMEOUT_S)
    assert done.returncode == expect, done.stdout + done.stderr
    return done.stdout + done.stderr


def submit(cluster: SlurmCluster, place: Path, name: str, *words: str, mishaps: str = "", step_s: float = 0.02) -> Job:
    """A run of the fake training function on two nodes with two ranks each."""
    efflaunch(cluster, place, *FAKE, f"run.id={name}", *words, FAKE_TRAINING=mishaps, FAKE_STEP_S=str(step_s))
    return Job(cluster, place / "runs" / name)
