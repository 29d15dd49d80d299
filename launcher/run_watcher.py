"""Runs beside a local run while the agent works: shows progress, keeps the lock fresh, notes what goes wrong."""

from __future__ import annotations

import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .agent.hang_verdict import silence_lines
from .agent.hang_watch import read_pulses
from .live_display import Display
from .output import SteadyOutput, complain
from .rundir import state
from .rundir.metrics_reader import MetricsFollower
from .rundir.notices import Notices
from .rundir.state import read_state
from .stop_forecast import GraceWatch

_SILENCE_S = 2.0


class Watcher:
    """Hands what is new in metrics.jsonl and state.json to the display."""

    def __init__(self, run_dir: Path, display: Display, follower: MetricsFollower, num_known_attempts: int, grace_s: float) -> None:
        self.grace = GraceWatch(grace_s)
        self.run_dir, self.display, self.follower = run_dir, display, follower
        self.num_reported = num_known_attempts
        self.stop_reported = self.silence_reported = False
        self.looked = 0.0

    def look(self, *, stopping: bool) -> None:
        """Show what is new since the last call."""
        if stopping and not self.stop_reported:
            self.stop_reported = True
            self.display.note("stopping: the step is finished and saved first (Ctrl-C again: kill the ranks now)")
        events = self.follower.read()
        self.display.show(events)
        note = self.grace.add(events).news()
        if note:
            self.display.note(note)
        current = read_state(self.run_dir)
        for attempt in current.attempts[self.num_reported :] if current else ():
            if attempt.ended is None or not attempt.decision:
                break
            self.num_reported += 1
            if attempt.failure is not None and attempt.restarted:
                self.display.note(f"attempt {attempt.number} failed after step {attempt.last_step}: {attempt.failure.message}")
                self.display.note(f"  {attempt.decision}; log: {self.run_dir / attempt.failure.log}")
        if current is not None and current.attempts and time.monotonic() - self.looked > _SILENCE_S:
            self.looked = time.monotonic()
            self._look_for_silence(current.attempts[-1])

    def _look_for_silence(self, attempt: state.Attempt) -> None:
        """Note it once when ranks begin to look stuck, and once when they make progress again."""
        rows = read_pulses(self.run_dir, attempt.number) if attempt.ended is None else []
        if rows and not self.silence_reported:
            self.display.note("\n".join(["ranks are silent:", *(f"  {line}" for line in silence_lines(rows))]))
        if not rows and self.silence_reported and attempt.ended is None:
            self.display.note("the ranks make progress again")
        self.silence_reported = bool(rows)


class Guard:
    """Runs what only shows a run or looks at it: whatever it raises is noted once, and the run continues without it.

    `tries_again`: what failed is called again the next time all the same, as where a file server was away.
    """

    def __init__(self, what: str, notices: Notices, *, tries_again: bool = False) -> None:
        self.what, self.notices, self.tries_again, self.failed = what, notices, tries_again, False

    def __call__(self, action: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
        """Return what `action` returns; None where it failed, now or (unless it is tried again) before."""
        if self.failed and not self.tries_again:
            return None
        try:
            return action(*arguments, **named)
        except Exception as error:  # whatever it is: the ranks are not to end with it
            if not self.failed:
                text = f"{self.what} failed ({type(error).__name__}: {error}): training continues without"
                self.notices.add(text, traceback.format_exc())
                complain(text)
            self.failed = True
            return None


def note_output(output: SteadyOutput, notices: Notices) -> None:
    """Say what became of standard output and error: in the run's log and status, and on the other of the two."""
    for text in output.news():
        notices.add(f"{text}; the run continues")
        print(f"efflaunch: {text}; the run continues", file=sys.stderr, flush=True)


def stop_notice(number: int) -> str:
    """Describe why a run was asked to stop, by the signal."""
    name = signal.Signals(number).name
    return f"told to save and stop by {name}" + (": its terminal was closed" if number == signal.SIGHUP else "")
