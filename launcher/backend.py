"""Where the agents of a run are started: one protocol, a module for each scheduler."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

from ..errors import ConfigError
from ..utils.text import typed
from .config.run_config import Config
from .rundir import state
from .rundir.metrics_index import read_summary
from .rundir.state import RunState, read_state, write_state
from .stop_forecast import planned


@dataclass(frozen=True, kw_only=True, slots=True)
class Launch:
    """One start of a run, checked; its run directory need not be there yet."""

    config: Config
    run_dir: Path
    entry: str | None = None
    """Training function in place of the real one, as module:function."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Standing:
    """A run's state as its scheduler has it; `detail` is a sentence."""

    state: str
    detail: str = ""
    pid: int | None = None
    """The process to signal, where it is one of this machine."""
    job: str | None = None


class Launcher(Protocol):
    """The protocol of a backend. Errors are EfflaunchError."""

    def check(self, config: Config) -> None:
        """ConfigError where the configuration cannot be launched from here."""
        ...

    def describe(self, launch: Launch) -> str:
        """Exactly what `submit` would hand over. Touches nothing."""
        ...

    def submit(self, launch: Launch) -> int:
        """Start it: the exit code of a run in the foreground, 0 for one that was handed to a scheduler."""
        ...

    def status(self, run_dir: Path, state: RunState) -> Standing:
        """Return where the run stands, by the scheduler and not by what a dead process wrote last."""
        ...

    def cancel(self, run_dir: Path, state: RunState, *, now: bool) -> str:
        """Have it save and stop, or stop `now`; returns what was done. ConfigError where nothing runs."""
        ...

    def logs(self, run_dir: Path) -> list[Path]:
        """Files the scheduler and the agents wrote, beside the ranks' own."""
        ...


def announce(run_dir: Path, is_resumed: bool, revision: int, changes: list[str]) -> None:
    """Say where the run is, and what is new in its configuration."""
    print(f"{'resuming' if is_resumed else 'run directory'} {run_dir}", flush=True)
    if changes:
        print(f"revision {revision} of its configuration:", *changes, sep="\n  ", flush=True)


def print_submitted(news: str, launch: Launch) -> None:
    """Print that the scheduler has it, and what to type from here on."""
    print(news)
    note = grace_note(launch)
    if note:
        print(f"  {note}")
    for name, command in (("look", "status"), ("logs", "logs"), ("stop", "cancel")):
        print(f"  {name:<12}{typed(command, launch.run_dir)}")


def note_refused(run_dir: Path) -> None:
    """The scheduler did not take it: the run, queued a moment ago, has failed."""
    run_state = read_state(run_dir)
    assert run_state is not None, "just written"
    write_state(run_dir, replace(run_state, state=state.FAILED))


def job_exists(run_dir: Path, existing: str) -> ConfigError:
    """A job of this run already waits or runs."""
    hint = f"{typed('cancel', run_dir)} first, or another run.id"
    return ConfigError(str(run_dir), found=existing, expected="one job per run directory", hint=hint)


def grace_note(launch: Launch) -> str:
    """Return a warning where a stop will not end in launcher.grace_s, as far as is known before the job runs; else an empty text."""
    config = launch.config
    forecast = read_summary(launch.run_dir).forecast(config.launcher.grace_s) or planned(config)
    return "" if forecast is None or forecast.fits else str(forecast)
