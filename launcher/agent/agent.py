"""The process that owns the ranks of this machine: starts them, forwards stops, restarts them, decides the exit code.

`python -m efflaunch.launcher.agent RUN_DIR`. It holds no terminal and shows nothing: what happened stands in state.json.

Signals it takes: a stop signal (any number of times) is handed to the ranks, which then have `launcher.grace_s` to save;
SIGQUIT kills them at once. If the agent's parent dies, the kernel kills the agent, and with it every rank.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from ...cluster.config import Device
from ...errors import EXIT_DONE, EXIT_PREEMPTED, EXIT_RETRY, EXIT_USER
from ..config.run_config import Config
from ..config.secrets import redact
from ..env import rank_environment, secrets, variables_set
from ..output import lenient_output
from ..rundir import state
from ..rundir.metrics_index import newest_step
from ..rundir.run_dir import attempt_dir, keep_private, read_run
from ..rundir.small_files import tail_lines
from ..rundir.state import Attempt, Failure, RunState, read_state, write_state
from . import worker
from .flight_recorder import recorder_of
from .hang_watch import HangWatch
from .peers import NoPeers, Peers
from .restart_policy import Action, AttemptOutcome, RankReport, first_failure, next_action
from .signals import describe_exit, die_with_parent, on_stop_signals, release_stop_signals

if TYPE_CHECKING:
    from .elastic import RankAgent

_LOG_TAIL_LINES = 30


def main(arguments: list[str]) -> int:
    """Run the ranks of a run directory to the end; the return value is the job's exit code."""
    parser = argparse.ArgumentParser(prog="efflaunch.launcher.agent")
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("--entry", default=worker.TRAIN, help="training function as module:function")
    parser.add_argument("--parent", type=int, default=os.getppid(), help="process whose death ends this one")
    options = parser.parse_args(arguments)
    lenient_output()
    die_with_parent(options.parent)
    return Agent(options.run_dir, options.entry).run()


class Agent:
    """Owns the ranks of one node. `run` makes attempt after attempt, until one of them decides the job; `run_ranks` a single one.

    `config`: of the attempt, where it is not the run's own.
    """

    def __init__(self, run_dir: Path, entry: str, *, peers: Peers | None = None, config: Config | None = None) -> None:
        self.run_dir, self.entry = run_dir, entry
        self.peers: Peers = peers or NoPeers()
        self.config = config or read_run(run_dir).config
        keep_private(self.config.run.private)
        self.ranks: RankAgent | None = None
        self.watch: HangWatch | None = None
        self.hang: Failure | None = None
        """The failure that the hang watch reported for this attempt; None while nothing hangs."""
        self.reports: list[RankReport] = []
        """How the ranks of the last attempt ended; empty where all ended well."""
        self.stopping = False
        self.out_of_time = 0
        """The signal that ended the ranks' time to save."""
        on_stop_signals(self._stop)
        for number in (signal.SIGALRM, signal.SIGQUIT):
            signal.signal(number, self._kill_now)
        release_stop_signals()
        run_state = read_state(run_dir)
        assert run_state is not None, "whoever starts an agent writes state.json first"
        self.state: RunState = run_state

    def run(self) -> int:
        """The job's exit code, with state.json saying the same."""
        os.environ.update(rank_environment(self.config))
        worker.preload(self.entry)
        history: list[AttemptOutcome] = []
        start_step = newest_step(self.run_dir)
        while True:
            outcome = self._attempt()
            action = self._decide(outcome, history, start_step)
            if not action.restart:
                return self._finish(action)
            history.append(outcome)

    def _decide(self, outcome: AttemptOutcome, history: list[AttemptOutcome], start_step: int) -> Action:
        limit = self.config.launcher.max_restarts
        action = next_action(outcome, history, start_step=start_step, max_restarts=limit, stopping=self.stopping)
        self._update_attempt(decision=action.reason, restarted=action.restart)
        return action

    def _finish(self, action: Action) -> int:
        ends = {EXIT_DONE: state.DONE, EXIT_PREEMPTED: state.PREEMPTED}
        self.write(state=ends.get(action.exit_code, state.FAILED), exit_code=action.exit_code, ended=time.time())
        return action.exit_code

    def _attempt(self) -> AttemptOutcome:
        number = len(self.state.attempts) + 1
        attempt_dir(self.run_dir, number).mkdir(parents=True, exist_ok=True)
        if self.stopping:
            # Nothing runs: the last checkpoint is all there is to save.
            return AttemptOutcome(exit_code=EXIT_PREEMPTED, step=newest_step(self.run_dir))
        attempt = Attempt(number=number, started=time.time())
        self.write(state=state.RUNNING, attempts=(*self.state.attempts, attempt))
        exit_code, failure = self.run_ranks(number)
        outcome = AttemptOutcome(exit_code=exit_code, step=newest_step(self.run_dir))
        self._update_attempt(ended=time.time(), exit_code=exit_code, last_step=outcome.step, failure=failure)
        return outcome

    def run_ranks(self, number: int) -> tuple[int, Failure | None]:
        """Run the ranks of one attempt on this node: (exit code, None where they ended well)."""
        from .elastic import make_agent

        flush_output()
        launcher, ranks_here = self.config.launcher, self.peers.ranks(self.config.cluster.ranks_per_node)
        recorder = recorder_of(self.config, attempt_dir(self.run_dir, number), ranks_here)
        self.hang, self.watch = None, HangWatch(self.run_dir, number, ranks_here, launcher, self.peers.others(), recorder=recorder)
        self.ranks = make_agent(
            worker.main,
            (str(self.run_dir), self.entry, number, os.getpid(), self.watch.place()),
            num_ranks=self.config.cluster.ranks_per_node,
            rendezvous=self.peers.rendezvous(f"{self.run_dir.name}-{number}", int(launcher.start_timeout_s)),
            start_method=start_method(self.config),
            on_start=self._hand_over,
            on_poll=self._poll,
        )
        with closing(self.watch), variables_set({} if recorder is None else recorder.variables()):
            result = self.ranks.run()
        signal.setitimer(signal.ITIMER_REAL, 0)
        ranks, self.ranks, self.reports = self.ranks, None, []
        if not result.is_failed():
            codes = [code for code in result.return_values.values() if code]
            return (max(codes) if codes else EXIT_DONE), None
        self.reports = list(self._reports(ranks, ranks_here, number))
        return (EXIT_RETRY, self.hang) if self.hang is not None else self._failed(self.reports, number)

    def _reports(self, ranks: RankAgent, ranks_here: range, number: int) -> Iterator[RankReport]:
        logs = attempt_dir(self.run_dir, number)
        for rank in ranks_here:
            process = ranks.processes.get(rank)
            yield RankReport(
                rank=rank,
                exit_code=process.exitcode if process is not None else None,
                stopped_by_agent=bool(self.out_of_time) or rank in ranks.killed,
                record=worker.read_error(logs, rank),
            )

    def _failed(self, reports: list[RankReport], number: int) -> tuple[int, Failure]:
        first = first_failure(reports)
        if first is None:
            in_time = f"did not save within launcher.grace_s={self.config.launcher.grace_s:g} s and were killed"
            own = f"the ranks {in_time if self.out_of_time == signal.SIGALRM else 'were killed at once, as asked'}"
            message = self.peers.end_reason or own
            return EXIT_RETRY, Failure(rank=reports[0].rank, message=message, traceback="", log=str(attempt_dir(Path(), number)))
        failure = read_failure(self.run_dir, number, first)
        return (EXIT_USER if failure.is_user_error else EXIT_RETRY), failure

    # The handlers run in the middle of anything, so they set flags and send signals, and write no file.

    def _stop(self, number: int, frame: FrameType | None) -> None:
        if not self.stopping:
            self.stopping = True
            self._hand_over()

    def _kill_now(self, number: int, frame: FrameType | None) -> None:
        self.stopping, self.out_of_time = True, number
        self._hand_over()

    def _hand_over(self) -> None:
        if self.ranks is None or not self.stopping:
            return
        if self.out_of_time:
            self.ranks.send(signal.SIGKILL)
        else:
            signal.setitimer(signal.ITIMER_REAL, self.config.launcher.grace_s)
            self.ranks.send(signal.SIGUSR2)

    def _poll(self) -> None:
        self._note_stop()
        assert self.ranks is not None and self.watch is not None, "asked by its monitor"
        self.peers.look(self.ranks, lambda: self._kill_now(signal.SIGQUIT, None))
        # Once they are to stop, launcher.grace_s is what they have. One that ended by itself explains the silence of the others.
        # What was found of a hang stands: ranks that were killed for it and are not gone yet would be taken for another.
        if self.stopping or self.hang is not None or any(process.exitcode is not None for process in self.ranks.processes.values()):
            return
        self.hang = self.watch.look({rank: process.pid for rank, process in self.ranks.processes.items() if process.pid is not None})
        if self.hang is not None:
            self.ranks.kill()

    def _note_stop(self) -> None:
        if self.stopping and self.state.state != state.STOPPING:
            self.write(state=state.STOPPING)

    def _update_attempt(self, **changes: Any) -> None:
        if self.state.attempts:
            *earlier, last = self.state.attempts
            self.write(attempts=(*earlier, replace(last, **changes)))

    def write(self, **changes: Any) -> None:
        """Change the state, and state.json as far as there is room for it: ranks do not end because a disk is full.

        Does nothing where the agent of another node writes it.
        """
        if not self.peers.writes_state:
            return
        self.state = replace(self.state, **changes)
        try:
            self.state = write_state(self.run_dir, self.state)
        except OSError as error:
            print(f"{self.run_dir / state.STATE_FILE} cannot be written: {error}", file=sys.stderr, flush=True)


def read_failure(run_dir: Path, number: int, report: RankReport) -> Failure:
    """describe_failure, with what the rank's log has."""
    log = attempt_dir(Path(), number) / f"rank-{report.rank}.log"
    lines = [redact(line, secrets()) for line in tail_lines(run_dir / log, _LOG_TAIL_LINES)]
    return describe_failure(report, str(log), lines)


def describe_failure(report: RankReport, log: str, log_tail: list[str]) -> Failure:
    """Describe the rank that failed first, for a person."""
    if report.record is None:
        hints = {-signal.SIGKILL: ", from outside or because the machine ran out of memory", 0: " in the middle of training"}
        message = f"rank {report.rank} {describe_exit(report.exit_code)}{hints.get(report.exit_code or 0, '')}"
        return Failure(rank=report.rank, message=message, traceback="\n".join(log_tail), log=log, exit_code=report.exit_code)
    is_user_error = report.record["exit_code"] == EXIT_USER
    message = report.record["message"] if is_user_error else f"rank {report.rank}: {report.record['type']}: {report.record['message']}"
    return Failure(rank=report.rank, message=message, traceback=report.record["traceback"], log=log, is_user_error=is_user_error)


def start_method(config: Config) -> str:
    """Ranks on a CPU are forked from the agent, which has torch loaded; CUDA does not survive a fork."""
    return "fork" if config.cluster.device is Device.CPU else "spawn"


def flush_output() -> None:
    """A forked rank must not print what the agent had buffered."""
    sys.stdout.flush()
    sys.stderr.flush()
