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
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Any

from ..errors import EXIT_DONE, EXIT_PREEMPTED, EXIT_RETRY, EXIT_USER, ConfigError
from ..utils.text import typed
from .agent.signals import on_stop_signals, stop_signals_deferred, stop_signals_kept
from .backend import Launch, Standing, announce
from .config.run_config import Config
from .live_display import Display, NoDisplay, make_display
from .output import SteadyOutput, steady_output
from .run_watcher import Guard, Watcher, note_output, stop_notice
from .rundir import state
from .rundir.lock import Owner, Presence, holding, is_locked
from .rundir.metrics_reader import MetricsFollower
from .rundir.notices import Notices
from .rundir.run_dir import RUN_FILE, make_run_dir, store_config
from .rundir.small_files import tail_lines
from .rundir.state import RunState, mend_state, new_state, read_state, write_state

AGENT_LOG = "logs/agent.log"
_POLL_S = 0.1
_FINAL_STATES = {EXIT_DONE: state.DONE, EXIT_PREEMPTED: state.PREEMPTED, EXIT_USER: state.FAILED}
_SECOND_STOP_S = 0.5
"""Seconds in which a second stop signal counts as the first: a terminal and a scheduler may both pass one Ctrl-C on."""


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
        with steady_output() as output, stop_signals_kept():
            with holding(run_dir) as lock:
                is_resumed = (run_dir / RUN_FILE).is_file()
                mended = mend_state(run_dir)
                if mended is not None:
                    print(mended, flush=True)
                revision, changes = store_config(run_dir, launch.config)
                announce(run_dir, is_resumed, revision, changes)
                code = run(launch.config, run_dir, revision=revision, lock=lock, output=output, entry=launch.entry)
            notices = Notices(run_dir, run_dir / AGENT_LOG)
            Guard("the report of the end", notices)(report_end, run_dir, code)
            output.drain()
            note_output(output, notices)
        return code

    def status(self, run_dir: Path, run_state: RunState) -> Standing:
        if run_state.state not in state.ACTIVE:
            return Standing(state=run_state.state)
        if not is_locked(run_dir):
            return Standing(state="died", detail="ended without a word, killed or the machine went down")
        return Standing(state=run_state.state, detail=f"process {run_state.pid} on {run_state.host}", pid=run_state.pid)

    def cancel(self, run_dir: Path, run_state: RunState, *, now: bool) -> str:
        if self.status(run_dir, run_state).pid is None:
            hint = typed("status", run_dir)
            raise ConfigError(str(run_dir), found=f"nothing running, state {run_state.state}", expected="a run to stop", hint=hint)
        if run_state.host != socket.gethostname():
            hint = f"on {run_state.host}: {typed('cancel', run_dir)}"
            raise ConfigError(str(run_dir), found=f"a run on {run_state.host}", expected="one of this machine", hint=hint)
        os.kill(run_state.pid, signal.SIGTERM)
        if not now:
            return f"process {run_state.pid} is told to finish its step, save and stop"
        time.sleep(2 * _SECOND_STOP_S)
        os.kill(run_state.pid, signal.SIGINT)
        return f"the ranks of process {run_state.pid} are killed; the last checkpoint stands"

    def logs(self, run_dir: Path) -> list[Path]:
        return [path for path in (run_dir / AGENT_LOG,) if path.is_file()]


def run(config: Config, run_dir: Path, *, revision: int, lock: int, output: SteadyOutput, entry: str | None = None) -> int:
    """Train to the end; returns the job's exit code. `lock` is inherited by every process of the run.

    Nothing that is shown, or cannot be, ends it. `entry` (module:function) replaces the training function, for tests of the launcher.
    """
    run_state = read_state(run_dir)
    initial = new_state(world_size=config.cluster.ranks_per_node, revision=revision, attempts=run_state.attempts if run_state else ())
    write_state(run_dir, initial)
    follower, notices = MetricsFollower(run_dir, from_end=True), Notices(run_dir, run_dir / AGENT_LOG)
    guard, guard_lock = Guard("the display", notices), Guard("the sign of life in the run's lock", notices, tries_again=True)
    display: Display = (
        guard(make_display, config.logging.display, f"{config.experiment} - {run_dir}", config.logging.every_steps) or NoDisplay()
    )
    try:
        with _started(run_dir, lock, entry) as (agent, relay):
            watcher = Watcher(run_dir, display, follower, len(initial.attempts), config.launcher.grace_s)
            presence = Presence(lock)
            while agent.poll() is None:
                _look(watcher, relay, guard)
                relay.note(notices)
                note_output(output, notices)
                _yield_to(guard_lock(presence.show), agent, guard, display)
                time.sleep(_POLL_S)
            relay.note(notices)
            _look(watcher, relay, guard)
    finally:
        Guard("the end of the display", notices)(display.close)
    return _final_state(run_dir, agent.returncode)


def _look(watcher: Watcher, relay: _Relay, guard: Guard) -> None:
    guard(watcher.look, stopping=relay.first is not None)


def _yield_to(other: Owner | None, agent: subprocess.Popen[bytes], guard: Guard, display: Display) -> None:
    """Two that both thought the directory theirs: the one that wrote itself down last has it."""
    if other is not None:
        agent.send_signal(signal.SIGQUIT)
        guard(display.note, f"{other.describe(time.time())}, has taken the run directory: the ranks here are killed")


@contextmanager
def _started(run_dir: Path, lock: int, entry: str | None) -> Iterator[tuple[subprocess.Popen[bytes], _Relay]]:
    # The agent is born with stop signals held, and takes them once it has its handlers; so does this process.
    with stop_signals_deferred():
        agent = _start_agent(run_dir, lock, entry)
        relay = _Relay(agent)
        on_stop_signals(relay)
    try:
        yield agent, relay
    finally:
        if agent.poll() is None:
            agent.kill()
            agent.wait()


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
        self._number = 0
        """The signal that came first, until it is noted."""

    def note(self, notices: Notices) -> None:
        """Keep why the run was asked to stop."""
        number, self._number = self._number, 0
        if number:
            notices.add(stop_notice(number))

    def __call__(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.first is None:
            self.first, self._number = now, number
            self.agent.send_signal(signal.SIGTERM)
        elif number == signal.SIGINT and now - self.first > _SECOND_STOP_S:
            self.agent.send_signal(signal.SIGQUIT)


def _final_state(run_dir: Path, returncode: int) -> int:
    """The exit code, with state.json made true where the agent could not."""
    current = read_state(run_dir)
    assert current is not None, "written before the agent was started"
    if current.exit_code is not None:
        return current.exit_code
    if returncode in _FINAL_STATES:
        # The agent had no room to write it down.
        with suppress(OSError):
            write_state(run_dir, replace(current, state=_FINAL_STATES[returncode], exit_code=returncode, ended=time.time()))
        return returncode
    lines = tail_lines(run_dir / AGENT_LOG, 40)
    message = f"the agent ended with {returncode} before its ranks did; the end of {run_dir / AGENT_LOG}:"
    broken = state.Failure(rank=-1, message=message, traceback="\n".join(lines), log=AGENT_LOG)
    with suppress(OSError):
        write_state(run_dir, _with_failure(current, broken))
    return EXIT_RETRY


def _with_failure(current: RunState, failure: state.Failure) -> RunState:
    now = time.time()
    ended: dict[str, Any] = {"ended": now, "exit_code": EXIT_RETRY, "failure": failure}
    *earlier, last = current.attempts or (state.Attempt(number=1, started=current.started),)
    attempts = (*earlier, replace(last, **ended))
    return replace(current, state=state.FAILED, exit_code=EXIT_RETRY, ended=now, attempts=attempts)
