"""`efflaunch cancel RUN_DIR`: have a run save and stop, whatever started it."""

from __future__ import annotations

import argparse
from pathlib import Path

from ...errors import EXIT_DONE, ConfigError
from ...utils.text import typed
from ..backend_registry import launcher_of
from ..rundir.run_dir import keep_private, read_run
from ..rundir.state import RunState, read_state
from .arguments import CommandParser, add_run_dir

DESCRIPTION = "Have a run finish its step, save and stop; a waiting job is taken from the queue. `efflaunch resume` continues it."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `efflaunch cancel`."""
    add_run_dir(parser)
    parser.add_argument("--now", action="store_true", help="end it without waiting for a save")


def main(words: list[str]) -> int:
    """Cancel the run and print what was done."""
    parser = CommandParser("cancel", DESCRIPTION)
    add_arguments(parser)
    options = parser.parse_args(words)
    return cancel(options.run_dir, now=options.now)


def cancel(run_dir: Path, *, now: bool) -> int:
    """Ask the run's backend to stop it, and print what it did."""
    stored = read_run(run_dir)
    keep_private(stored.config.run.private)
    print(launcher_of(stored.config.launcher.backend).cancel(run_dir, _state_of(run_dir), now=now))
    return EXIT_DONE


def _state_of(run_dir: Path) -> RunState:
    state = read_state(run_dir)
    if state is None:
        raise ConfigError(str(run_dir), found="a run that never started", expected="one that runs", hint=typed("resume", run_dir))
    return state
