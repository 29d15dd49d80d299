"""Run on this machine: one agent beside this process, which shows the progress and passes signals on."""

from __future__ import annotations

import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Any

from ..errors import EXIT_RETRY, ConfigError
from .agent.hang_verdict import silence_lines
from .agent.hang_watch import read_pulses
from .agent.signals import STOP_SIGNALS, on_stop_signals, stop_signals_held
from .backend import Launch, Standing, announce
from .config.run_config import Config
from .live_display import Display, make_display
from .rundir import state
from .rundir.lock import Owner, Presence, holding, is_locked
from .rundir.metrics_reader import MetricsFollower
from .rundir.run_dir import RUN_FILE, make_run_dir, store_config
from .rundir.small_files import tail_lines
from .rundir.state import RunState, mend_state, new_state, read_state, write_state
from .stop_forecast import GraceWatch

AGENT_LOG = "logs/agent.log"
_POLL_S, _SILENCE_S = 0.1, 2.0
_SECOND_STOP_S = 0.5
"""One Ctrl-C reaches a process group once, but a terminal and a scheduler may both pass it on."""


class LocalLauncher:
    """See backends.Launcher."""

    def check(self, config: Config) -> None:
        from .machine_checks import check_machine

        check_machine(config)

    def describe(self, launch: Launch) -> str:
        ranks = launch.config.cluster.ranks_per_node
        command = shlex.join(_agent_command(launch.run_dir, launch.entry))
        return f"# in the foreground: an agent with {ranks} ranks on this machine, and run.yaml as --print-config shows it\n{command}\n"

    def submit(self, launch: Launch) -> int:
        from .end_report import report_end

        run_dir = launch.run_dir
        make_run_dir(run_dir, private=launch.config.run.private)
        with holding(run_dir) as lock:
            goes_on = (run_dir / RUN_FILE).is_file()
            mended = mend_state(run_dir)
            if mended is not None:
                print(mended, flush=True)
            revision, changes = store_config(run_dir, launch.config)
            announce(run_dir, goes_on, revision, changes)
            code = run(launch.config, run_dir, revision=revision, lock=lock, entry=launch.entry)
        report_end(run_dir, code)
        return code

    def status(self, run_dir: Path, known: RunState) -> Standing:
        if known.state not in state.ACTIVE:
            return Standing(state=known.state)
        if not is_locked(run_dir):
            return Standing(state="died", detail="ended without a word, killed or the machine went down")
        return Standing(state=known.state, detail=f"process {known.pid} on {known.host}", pid=known.pid)

    def cancel(self, run_dir: Path, known: RunState, *, now: bool) -> str:
        if self.status(run_dir, known).pid is None:
            hint = f"efflaunch status {run_dir}"
            raise ConfigError(str(run_dir), found=f"nothing running, state {known.state}", expected="a run to stop", hint=hint)
        if known.host != socket.gethostname():
            hint = f"on {known.host}: efflaunch cancel {run_dir}"
            raise ConfigError(str(run_dir), found=f"a run on {known.host}", expected="one of this machine", hint=hint)
        os.kill(known.pid, signal.SIGTERM)
        if not now:
            return f"process {known.pid} is told to finish its step, save and stop"
        time.sleep(2 * _SECOND_STOP_S)
        os.kill(known.pid, signal.SIGINT)
        return f"the ranks of process {known.pid} are killed; the last checkpoint stands"

    def logs(self, run_dir: Path) -> list[Path]:
        return [path for path in (run_dir / AGENT_LOG,) if path.is_file()]


def run(config: Config, run_dir: Path, *, revision: int, lock: int, entry: str | None = None) -> int:
    """Train to the end; returns the job's exit code. `lock` is inherited by every process of the run.

    `entry` (module:function) replaces the training function, for tests of the launcher.
    """
    known = read_state(run_dir)
    initial = new_state(world_size=config.cluster.ranks_per_node, revision=revision, attempts=known.attempts if known else ())
    write_state(run_dir, initial)
    follower = MetricsFollower(run_dir, from_end=True)
    display = make_display(config.logging.display, f"{config.experiment} - {run_dir}", config.logging.every_steps)
    try:
        with _started(run_dir, lock, entry) as (agent, relay):
            watcher = Watcher(run_dir, display, follower, len(initial.attempts), config.launcher.grace_s)
            presence = Presence(lock)
            while agent.poll() is None:
                watcher.look(stopping=relay.first is not None)
                _yield_to(presence.show(), agent, display)
                time.sleep(_POLL_S)
            watcher.look(stopping=relay.first is not None)
    finally:
        display.close()
    return _settled(run_dir, agent.returncode)


def _yield_to(other: Owner | None, agent: subprocess.Popen[bytes], display: Display) -> None:
    """Two that both thought the directory theirs: the one that wrote itself down last has it."""
    if other is not None:
        display.note(f"{other.describe(time.time())}, has taken the run directory: the ranks here are killed")
        agent.send_signal(signal.SIGQUIT)


class Watcher:
    """Hands what is new in metrics.jsonl and state.json to the display."""

    def __init__(self, run_dir: Path, display: Display, follower: MetricsFollower, num_known_attempts: int, grace_s: float) -> None:
        self.grace = GraceWatch(grace_s)
        self.run_dir, self.display, self.follower = run_dir, display, follower
        self.num_told = num_known_attempts
        self.told_stop = self.told_silence = False
        self.looked = 0.0

    def look(self, *, stopping: bool) -> None:
        if stopping and not self.told_stop:
            self.told_stop = True
            self.display.note("stopping: the step is finished and saved first (Ctrl-C again: kill the ranks now)")
        events = self.follower.read()
        self.display.show(events)
        note = self.grace.add(events).news()
        if note:
            self.display.note(note)
        current = read_state(self.run_dir)
        for attempt in current.attempts[self.num_told :] if current else ():
            if attempt.ended is None or not attempt.decision:
                break
            self.num_told += 1
            if attempt.failure is not None and attempt.restarted:
                self.display.note(f"attempt {attempt.number} failed after step {attempt.last_step}: {attempt.failure.message}")
                self.display.note(f"  {attempt.decision}; log: {self.run_dir / attempt.failure.log}")
        if current is not None and current.attempts and time.monotonic() - self.looked > _SILENCE_S:
            self.looked = time.monotonic()
            self._look_for_silence(current.attempts[-1])

    def _look_for_silence(self, attempt: state.Attempt) -> None:
        """Once when ranks begin to look stuck, and once when they go on."""
        rows = read_pulses(self.run_dir, attempt.number) if attempt.ended is None else []
        if rows and not self.told_silence:
            self.display.note("\n".join(["ranks are silent:", *(f"  {line}" for line in silence_lines(rows))]))
        if not rows and self.told_silence and attempt.ended is None:
            self.display.note("the ranks go on")
        self.told_silence = bool(rows)


@contextmanager
def _started(run_dir: Path, lock: int, entry: str | None) -> Iterator[tuple[subprocess.Popen[bytes], _Relay]]:
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    # The agent is born with stop signals held, and takes them once it has its handlers; so does this process.
    with stop_signals_held():
        agent = _start_agent(run_dir, lock, entry)
        relay = _Relay(agent)
        on_stop_signals(relay)
    try:
        yield agent, relay
    finally:
        if agent.poll() is None:
            agent.kill()
            agent.wait()
        for number, handler in before.items():
            signal.signal(number, handler)


def _start_agent(run_dir: Path, lock: int, entry: str | None) -> subprocess.Popen[bytes]:
    command = [*_agent_command(run_dir, entry), "--parent", str(os.getpid())]
    with (run_dir / AGENT_LOG).open("ab") as log:
        # A process group of its own: Ctrl-C at the terminal reaches only this process, which passes it on once.
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            pass_fds=(lock,),
            process_group=0,
        )


def _agent_command(run_dir: Path, entry: str | None) -> list[str]:
    module = f"{__package__}.agent"
    return [sys.executable, "-m", module, str(run_dir), *(["--entry", entry] if entry else [])]


class _Relay:
    """The first stop signal asks the agent to save and stop; a second Ctrl-C asks it to kill the ranks."""

    def __init__(self, agent: subprocess.Popen[bytes]) -> None:
        self.agent = agent
        self.first: float | None = None

    def __call__(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.first is None:
            self.first = now
            self.agent.send_signal(signal.SIGTERM)
        elif number == signal.SIGINT and now - self.first > _SECOND_STOP_S:
            self.agent.send_signal(signal.SIGQUIT)


def _settled(run_dir: Path, returncode: int) -> int:
    """The exit code, with state.json made true where the agent could not."""
    current = read_state(run_dir)
    assert current is not None, "written before the agent was started"
    if current.exit_code is not None:
        return current.exit_code
    lines = tail_lines(run_dir / AGENT_LOG, 40)
    message = f"the agent ended with {returncode} before its ranks did; the end of {run_dir / AGENT_LOG}:"
    broken = state.Failure(rank=-1, message=message, traceback="\n".join(lines), log=AGENT_LOG)
    write_state(run_dir, _with_failure(current, broken))
    return EXIT_RETRY


def _with_failure(current: RunState, failure: state.Failure) -> RunState:
    now = time.time()
    ended: dict[str, Any] = {"ended": now, "exit_code": EXIT_RETRY, "failure": failure}
    *earlier, last = current.attempts or (state.Attempt(number=1, started=current.started),)
    attempts = (*earlier, replace(last, **ended))
    return replace(current, state=state.FAILED, exit_code=EXIT_RETRY, ended=now, attempts=attempts)
