"""Small files below RUN_DIR/ray by which the parts of a run on Ray exchange messages."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from ...errors import ConfigError
from ...utils.atomic_files import write_atomic
from ...utils.decode import decode
from ...utils.text import typed
from ..rundir.small_files import write_json
from ..rundir.state import read_state
from .request import FOLDER

SAVE, NOW = "save", "now"
"""The two ways to stop a run: finish the step, save and end; or end at once."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Submission:
    """The last time the run was handed over."""

    job: str
    address: str
    """Address of the job server; empty for a run in the foreground."""
    number: int


def write_submission(run_dir: Path, submission: Submission) -> None:
    """Note it."""
    write_json(run_dir / FOLDER / "job.json", asdict(submission))


def read_submission(run_dir: Path) -> Submission | None:
    """Read the last submission of the run; None where there was none."""
    path = run_dir / FOLDER / "job.json"
    try:
        return decode(Submission, json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        hint = f"`ray job list` finds the job; rm {path} where there is none any more"
        raise ConfigError(str(path), found=str(error), expected="the job that was submitted last", hint=hint) from error


def output_file(run_dir: Path, job: str) -> Path:
    """All that the driver and the agents of a job printed."""
    return run_dir / FOLDER / f"{job}.out"


def _stop_file(run_dir: Path, job: str) -> Path:
    return run_dir / FOLDER / f"stop-{job}"


def request_stop(run_dir: Path, job: str, how: str) -> None:
    """Leave a stop request for the driver of the job."""
    write_atomic(_stop_file(run_dir, job), how)


def requested_stop(run_dir: Path, job: str) -> str | None:
    """Read how the job was asked to stop; None where it was not."""
    try:
        return _stop_file(run_dir, job).read_text()
    except FileNotFoundError:
        return None


@contextmanager
def only_driver(run_dir: Path) -> Iterator[None]:
    """Held by the driver for as long as it lives, between attempts as well. ConfigError where there is another one."""
    file = os.open(_driver_lock(run_dir), os.O_RDWR | os.O_CREAT, 0o600)
    try:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            run_state = read_state(run_dir)
            who = f"process {run_state.pid} on {run_state.host}" if run_state else "another process"
            hint = f"{typed('status', run_dir)}; {typed('cancel', run_dir)} to stop it; or another run.id"
            expected = "one efflaunch per run directory"
            raise ConfigError(str(run_dir), found=f"{who} running it on Ray", expected=expected, hint=hint) from error
        yield
    finally:
        os.close(file)


def has_driver(run_dir: Path) -> bool:
    """Return whether a driver of the run is alive."""
    try:
        with only_driver(run_dir):
            return False
    except ConfigError:
        return True
    except OSError:
        return False


def _driver_lock(run_dir: Path) -> Path:
    return run_dir / FOLDER / "driver.lock"


def clear(run_dir: Path) -> None:
    """Make the folder, and forget messages to earlier jobs."""
    (run_dir / FOLDER).mkdir(exist_ok=True)
    for pattern in ("stop-*", "seen-*"):
        for path in (run_dir / FOLDER).glob(pattern):
            os.unlink(path)
