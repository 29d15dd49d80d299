"""Where the agents of a run are started: one protocol, a module for each scheduler."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from ...units import format_seconds
from ..config import Backend, Config
from ..metrics_file import Event
from ..state import RunState


@dataclass(frozen=True, kw_only=True, slots=True)
class Launch:
    """One start of a run, checked; its run directory need not be there yet."""

    config: Config
    run_dir: Path
    entry: str | None = None
    """Training function in place of the real one, as module:function."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Standing:
    """A run's state as its scheduler has it; `detail` is for people."""

    state: str
    detail: str = ""
    pid: int | None = None
    """The process to signal, where it is one of this machine."""
    job: str | None = None


class Launcher(Protocol):
    """What every backend can do. Errors are EfflaunchError."""

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
        """Where it stands, by the scheduler and not by what a dead process wrote last."""
        ...

    def cancel(self, run_dir: Path, state: RunState, *, now: bool) -> str:
        """Have it save and stop, or stop `now`; returns what was done. ConfigError where nothing runs."""
        ...

    def logs(self, run_dir: Path) -> list[Path]:
        """Files the scheduler and the agents wrote, beside the ranks' own."""
        ...


def launcher_of(backend: Backend) -> Launcher:
    """The module behind `launcher=...`."""
    if backend is Backend.SLURM:
        from . import slurm

        return slurm.SlurmLauncher()
    if backend is Backend.RAY:
        from . import ray

        return ray.RayLauncher()
    from . import local

    return local.LocalLauncher()


def announce(run_dir: Path, goes_on: bool, revision: int, changes: list[str]) -> None:
    """Say where the run is, and what is new in its configuration."""
    print(f"{'going on in' if goes_on else 'run directory'} {run_dir}", flush=True)
    if changes:
        print(f"revision {revision} of its configuration:", *changes, sep="\n  ", flush=True)


def grace_note(events: list[Event], grace_s: float) -> str:
    """What to say where the run's own steps and saves have taken longer than there will be time; else nothing. Pure."""
    step_s = max((float(event["step_s"]) for event in events if event["event"] == "step" and "step_s" in event), default=0.0)
    save_s = max((float(event["save_s"]) for event in events if event["event"] == "checkpoint"), default=0.0)
    if step_s + save_s <= grace_s:
        return ""
    taken = f"{format_seconds(step_s)} for a step and {format_seconds(save_s)} for a save"
    return f"a stop may not end in time: this run has taken up to {taken}, launcher.grace_s={grace_s:g}"
