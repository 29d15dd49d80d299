"""state.json: what the launcher knows about a run, for `status` and the next start."""

from __future__ import annotations

import json
import os
import socket
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from ...errors import ConfigError
from ...utils.decode import decode, set_aside
from ...utils.text import plain_data, typed
from .small_files import write_json

STATE_FILE = "state.json"

QUEUED = "queued"
"""Handed to a scheduler, which has not started it, or not started it again."""
STARTING, RUNNING, STOPPING = "starting", "running", "stopping"
PREEMPTED, DONE, FAILED = "preempted", "done", "failed"
ACTIVE = (QUEUED, STARTING, RUNNING, STOPPING)


@dataclass(frozen=True, kw_only=True, slots=True)
class Failure:
    """The first rank that failed in an attempt: the cause, not the ranks that lost it."""

    rank: int
    message: str
    traceback: str
    """The whole traceback of the rank; the last lines of its log where it left none."""
    log: str
    """Path inside the run directory."""
    is_user_error: bool = False
    exit_code: int | None = None
    """Exit code of the rank's process, where it left no error record; negative: killed by that signal."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Attempt:
    """Record of one start of all ranks, and of its end."""

    number: int
    """Counts over the whole life of the run directory, from 1."""
    started: float
    ended: float | None = None
    exit_code: int | None = None
    last_step: int = 0
    """Newest step the run had reached when the attempt ended."""
    failure: Failure | None = None
    decision: str = ""
    """The decision that followed, with its reason."""
    restarted: bool = False
    num_nodes: int = 1
    world_size: int | None = None
    """Ranks of this attempt; None: the run's."""
    hosts: tuple[str, ...] = ()
    """Names of the attempt's nodes in the order of their ranks, where a scheduler gave them."""
    lost: tuple[str, ...] = ()
    """Names of nodes that were gone at the attempt's end."""
    blamed: dict[str, str] = field(default_factory=dict)
    """Nodes the attempt failed on, as far as that is known, each with the reason."""
    place: str = ""
    """The allocation they are of."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RunState:
    """`pid` is the efflaunch process to signal, on `host`; where a scheduler runs it, the one that wrote this."""

    state: str
    host: str
    pid: int
    world_size: int
    revision: int
    started: float
    updated: float
    ended: float | None = None
    exit_code: int | None = None
    attempts: tuple[Attempt, ...] = field(default=())
    job: str | None = None
    """Job name at the scheduler that last started the run."""
    attempts_before: int = 0
    """Attempts of earlier launches; restarts are counted from here."""
    step_before: int = 0
    """Newest step when it was launched; progress is counted from here."""
    excluded: dict[str, str] = field(default_factory=dict)
    """Nodes this run no longer uses, each with the reason."""

    @property
    def failure(self) -> Failure | None:
        """Failure of the last attempt; None where it has none."""
        return self.attempts[-1].failure if self.attempts else None

    @property
    def launch_attempts(self) -> tuple[Attempt, ...]:
        """Attempts of this launch, oldest first."""
        return self.attempts[self.attempts_before :]


def new_state(*, world_size: int, revision: int, attempts: tuple[Attempt, ...]) -> RunState:
    """The state of a run that this process is about to start."""
    now = time.time()
    return RunState(
        state=STARTING,
        host=socket.gethostname(),
        pid=os.getpid(),
        world_size=world_size,
        revision=revision,
        started=now,
        updated=now,
        attempts=attempts,
    )


def end_attempt(state: RunState, *, exit_code: int, failure: Failure | None, last_step: int) -> RunState:
    """`state` with its last attempt ended now."""
    *earlier, last = state.attempts
    ended = replace(last, ended=time.time(), exit_code=exit_code, failure=failure, last_step=last_step)
    return replace(state, attempts=(*earlier, ended))


def write_state(run_dir: Path, state: RunState) -> RunState:
    """Write it with the time of now; returns what was written."""
    state = replace(state, updated=time.time())
    write_json(run_dir / STATE_FILE, asdict(state))
    return state


def read_state(run_dir: Path) -> RunState | None:
    """Read state.json; None where the run never started. ConfigError for a file that is damaged."""
    path = run_dir / STATE_FILE
    try:
        run_state = decode(RunState, plain_data(json.loads(path.read_text(encoding="utf-8"))))
        if run_state.pid < 1:
            raise ValueError(f"pid is {run_state.pid}, not that of a process")
        return run_state
    except FileNotFoundError:
        return None
    except (ValueError, RecursionError, OSError) as error:
        raise ConfigError(
            str(path),
            found=str(error).splitlines()[0],
            expected="the state as efflaunch wrote it",
            hint=f"mv {path} {path}.damaged: {typed('resume', run_dir)} writes a new one, without the history of attempts",
        ) from error


def mend_state(run_dir: Path) -> str | None:
    """Set a damaged state.json aside, so that the next start writes it anew; a sentence that says so. The lock must be held."""
    try:
        read_state(run_dir)
    except ConfigError as error:
        return set_aside(run_dir / STATE_FILE, error.found)
    return None
