"""Runs handed to a real scheduler (bench/clusters), for tests of launcher=slurm and launcher=ray."""

from __future__ import annotations

import subprocess
import sys
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from efflaunch.bench.clusters.spaces import TIMEOUT_S, wait_until
from efflaunch.launcher.rundir.metrics_index import newest_step
from efflaunch.launcher.rundir.metrics_reader import MetricsFollower
from efflaunch.launcher.rundir.progress import RunProgress
from efflaunch.launcher.rundir.state import RunState, read_state
from efflaunch.tests.launcher.runs import HERE, environment

FAKE = HERE / "drive.py"
"""The efflaunch command with the fake training function."""
HELD = HERE.parent / "slow_side.py"
"""With the real one, held at the steps of HOLD_STEPS."""


@dataclass
class ClusterJob(ABC):
    """One run, as its directory shows it."""

    run_dir: Path

    @abstractmethod
    def has_ended(self) -> bool:
        """As the scheduler says."""

    @abstractmethod
    def output(self) -> str:
        """What the job printed."""

    def wait_for_step(self, step: int) -> None:
        """Until the run got so far; fails where the job ends before."""

        def reached() -> bool:
            ended = self.has_ended()
            assert not ended or newest_step(self.run_dir) >= step, self.output()
            return newest_step(self.run_dir) >= step

        wait_until(reached, f"step {step}")

    def wait_until_held(self, marker: str) -> None:
        """Until a rank has made that file of the run directory and waits."""

        def held() -> bool:
            assert not self.has_ended(), self.output()
            return (self.run_dir / marker).exists()

        wait_until(held, marker)

    def state(self) -> RunState:
        state = read_state(self.run_dir)
        assert state is not None
        return state

    def losses(self) -> dict[int, float]:
        return losses(self.run_dir)


def losses(run_dir: Path) -> dict[int, float]:
    """Loss of each step as it counts in the end."""
    return RunProgress().apply(MetricsFollower(run_dir).read()).losses


def run_efflaunch(
    cluster: Mapping[str, str], place: Path, *words: str, script: Path | None = FAKE, expect: int = 0, variables: Mapping[str, str]
) -> str:
    """What an efflaunch command prints in `place`, given the variables of a cluster and more; `script`: with its training function."""
    command = [sys.executable, "-m", "efflaunch"] if script is None else [sys.executable, str(script)]
    env = {**environment(), **cluster, "PYTHONPATH": environment()["PYTHONPATH"], **variables}
    done = subprocess.run([*command, *words], cwd=place, env=env, capture_output=True, text=True, timeout=TIMEOUT_S)
    assert done.returncode == expect, done.stdout + done.stderr
    return done.stdout + done.stderr
