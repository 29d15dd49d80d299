"""Real efflaunch processes with the fake training function, for tests."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import efflaunch
from efflaunch.launcher.rundir.metrics_index import newest_step
from efflaunch.launcher.rundir.state import RunState, read_state
from efflaunch.tests.limits import ENDS_S, wait_until

HERE = Path(efflaunch.__file__).parent / "tests" / "launcher"
"""By the name the package has, not where a link leads: what lies below it is known for its own in stacks."""
BASE = ("+experiment=quickstart", "cluster.ranks_per_node=2", "checkpoint.every_steps=5", "run.id=run", "logging.display=plain")


class Run:
    """One efflaunch process in a directory of its own."""

    def __init__(self, directory: Path, *words: str, mishaps: str = "", step_s: float = 0.02, **variables: str) -> None:
        self.run_dir = directory / "runs" / "run"
        self.output = directory / f"output-{time.monotonic_ns()}"
        self.errors = self.output.with_suffix(".errors")
        with self.output.open("wb") as out, self.errors.open("wb") as err:
            self.process = subprocess.Popen(
                [sys.executable, str(HERE / "drive.py"), *words],
                cwd=directory,
                env=environment() | {"FAKE_TRAINING": mishaps, "FAKE_STEP_S": str(step_s)} | variables,
                stdout=out,
                stderr=err,
                start_new_session=True,
            )

    def wait(self) -> int:
        return self.process.wait(ENDS_S)

    def wait_for_step(self, step: int) -> None:
        wait_until(lambda: newest_step(self.run_dir) >= step or self.process.poll() is not None)
        assert self.process.poll() is None, self.text()

    def wait_until_held(self, rank: int, step: int) -> None:
        """Until `rank`, whose mishap is `hold`, waits at the beginning of `step`."""
        wait_until(lambda: (self.run_dir / f"happened-hold-{rank}-{step}").exists() or self.process.poll() is not None)
        assert self.process.poll() is None, self.text()

    def release(self) -> None:
        """Release the ranks that are held."""
        (self.run_dir / "released").touch(0o600)

    def send(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def text(self) -> str:
        return self.output.read_text() + self.errors.read_text()

    def state(self) -> RunState:
        state = read_state(self.run_dir)
        assert state is not None
        return state

    def rank_pid(self, rank: int) -> int:
        return int((self.run_dir / f"rank-{rank}.pid").read_text())


def train(directory: Path, *overrides: str, mishaps: str = "", step_s: float = 0.02, steps: int = 12, **variables: str) -> Run:
    """`efflaunch train` with two fake ranks."""
    return Run(directory, "train", *BASE, f"train.steps={steps}", *overrides, mishaps=mishaps, step_s=step_s, **variables)


def environment() -> dict[str, str]:
    """An environment in which a fresh interpreter finds the package and the fake training function."""
    parent = Path(efflaunch.__file__).resolve().parent.parent
    path = os.pathsep.join([str(HERE), str(parent), os.environ.get("PYTHONPATH", "")])
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}


def is_alive(pid: int) -> bool:
    """Whether a process of this id runs (a zombie does not)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def descendants(pid: int) -> list[int]:
    """Every process below `pid`."""
    import psutil

    return [child.pid for child in psutil.Process(pid).children(recursive=True)]
