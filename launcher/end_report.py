"""Prints the end of a run: how it ended, what to type next, and the error of a failed one."""

from __future__ import annotations

import sys
from pathlib import Path

from ..errors import EXIT_DONE, EXIT_PREEMPTED
from ..training.optimizers.config import ScheduleOnResume
from ..training.optimizers.lr_schedule import ends_at_zero
from ..utils.text import typed
from .rundir.metrics_index import read_progress
from .rundir.progress import RunProgress, summary_lines
from .rundir.run_dir import read_run
from .rundir.state import read_state


def report_end(run_dir: Path, code: int) -> None:
    """Say how it ended and what to type next; the error of a failed run comes last and in full, on stderr."""
    progress = read_progress(run_dir)
    titles = {EXIT_DONE: "done", EXIT_PREEMPTED: "stopped and saved"}
    state = read_state(run_dir)
    reason = state.attempts[-1].decision if state and state.attempts else ""
    rows = [*summary_lines(progress), ("run", str(run_dir)), *_next_commands(run_dir, code, progress)]
    print(f"\n{titles.get(code, f'failed: {reason}')}")
    for name, value in rows:
        print(f"  {name:<12}{value}")
    sys.stdout.flush()
    if code not in titles:
        print_failure(run_dir)


def _next_commands(run_dir: Path, code: int, progress: RunProgress) -> list[tuple[str, str]]:
    more = [f"train.steps={2 * progress.steps}"] if code == EXIT_DONE and progress.steps else []
    if more and ends_at_zero(read_run(run_dir).config.optim, progress.steps):
        more.append(f"optim.schedule_on_resume={ScheduleOnResume.REWARM.value}")
    rows = [("resume", typed("resume", run_dir, *more)), ("look", typed("status", run_dir))]
    if progress.checkpoint is not None:
        rows.append(("export", typed("export", run_dir, "OUT")))
    return rows


def print_failure(run_dir: Path) -> None:
    """The first failure of a run, in full, on stderr."""
    state = read_state(run_dir)
    failure = state.failure if state else None
    if failure is None:
        return
    if failure.is_user_error:
        print(f"\nefflaunch: {failure.message}", file=sys.stderr)
        return
    print(f"\nfirst failure: {failure.message}\n(log: {run_dir / failure.log})", file=sys.stderr)
    if failure.traceback:
        print(failure.traceback, file=sys.stderr)
