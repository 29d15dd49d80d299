"""What a batch script asks on its first node: `python -m efflaunch.launcher.slurm.job prepare|start|settle`.

prepare OVERRIDES: make the run directory of a script submitted by hand; prints it.
start RUN_DIR: begin an attempt; prints where its nodes meet.
settle RUN_DIR: what became of the attempt, and what follows; the exit code is a decide.Verdict.
"""

from __future__ import annotations

import signal
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import FrameType

from ...errors import EXIT_DONE, EXIT_RETRY, EXIT_USER, EfflaunchError
from .. import state
from ..config import Config
from ..env import SlurmPlace, slurm_place
from ..metrics_file import newest_step
from ..nodes.address import head_address, head_port
from ..nodes.decide import Decision, Limits, Verdict, decide
from ..nodes.meeting import Meeting
from ..nodes.outcome import conclude, decided, gather, is_open, store_queued, tell
from ..restarts import Outcome
from ..rundir import keep_private, lock_in_time, make_run_dir, read_run, release
from ..signals import STOP_SIGNALS
from ..state import Attempt, Failure, RunState, read_state, write_state
from .files import cancel_file, forget_stops, stop_file, write_submission
from .script import JOB_DIR

_LOG_TAIL_LINES = 30


def main(arguments: list[str]) -> int:
    """Run one of the three; the return value is the exit code."""
    what, *rest = arguments
    try:
        place = slurm_place()
        if what == "prepare":
            print(prepare(rest, place))
            return EXIT_DONE
        run_dir = Path(rest[0])
        _keep_stop_signals(run_dir, place)
        if what == "settle":
            return settle(run_dir, place)
        meeting = start(run_dir, place)
        print(meeting)
        return EXIT_DONE
    except EfflaunchError as error:
        print(f"efflaunch: {error}", file=sys.stderr, flush=True)
        return error.exit_code


def _keep_stop_signals(run_dir: Path, place: SlurmPlace) -> None:
    """A stop signal that comes while no agent runs is left as a file for the next one."""

    def keep(number: int, frame: FrameType | None) -> None:
        stop_file(run_dir, place.job, place.restart).touch()

    for number in STOP_SIGNALS:
        signal.signal(number, keep)


def prepare(overrides: list[str], place: SlurmPlace) -> Path:
    """The run directory of a script submitted by hand; made by the job's first life, known to its later ones."""
    from ..compose import compose
    from ..start import check_data

    given = {item.partition("=")[0].lstrip("+") for item in overrides}
    mine = [f"cluster.num_nodes={place.num_nodes}", f"run.id=job-{place.job}", "launcher=slurm"]
    config = compose([item for item in mine if item.partition("=")[0] not in given] + overrides)
    assert config.run.id is not None, "given above"
    run_dir = (Path(config.run.root) / config.run.id).resolve()
    known = read_state(run_dir)
    if known is None or known.job != str(place.job):
        if known is not None:
            release(lock_in_time(run_dir))
        stdout, sys.stdout = sys.stdout, sys.stderr  # only the directory is for the script to read
        try:
            check_data(config)
        finally:
            sys.stdout = stdout
        queue(run_dir, config)
        write_submission(run_dir, place.job)
    return run_dir


def queue(run_dir: Path, config: Config) -> tuple[int, list[str]]:
    """Make or revise the run directory for a job that is about to be submitted; (revision, what changed)."""
    make_run_dir(run_dir, private=config.run.private)
    (run_dir / JOB_DIR).mkdir(exist_ok=True)
    forget_stops(run_dir)
    return store_queued(run_dir, config)


def start(run_dir: Path, place: SlurmPlace) -> Meeting:
    """Begin the next attempt. EfflaunchError, with state.json saying so, where it must not begin."""
    # Before anything is written: another efflaunch may be running there.
    release(lock_in_time(run_dir))
    config = read_run(run_dir).config
    keep_private(config.run.private)
    known = read_state(run_dir)
    assert known is not None, "whoever submits a job writes state.json first"
    known = replace(known, job=str(place.job), host=place.name)
    if is_open(known):
        known = _close_lost(run_dir, config, known, place)
    interface = config.launcher.slurm.interface
    try:
        address = head_address(place.name, interface)
    except EfflaunchError as error:
        failure = Failure(rank=-1, message=str(error), traceback="", log=JOB_DIR, is_user_error=True)
        known = replace(known, attempts=(*known.attempts, Attempt(number=len(known.attempts) + 1, started=time.time())))
        known = state.end_attempt(known, exit_code=EXIT_USER, failure=failure, last_step=newest_step(run_dir))
        conclude(run_dir, known, Decision(verdict=Verdict.USER, reason="would fail again in the same way"))
        raise
    attempt = Attempt(number=len(known.attempts) + 1, started=time.time())
    write_state(run_dir, replace(known, state=state.STARTING, exit_code=None, ended=None, attempts=(*known.attempts, attempt)))
    return Meeting(attempt.number, address, head_port(place.job, address), int(config.launcher.start_timeout_s))


def _close_lost(run_dir: Path, config: Config, known: RunState, place: SlurmPlace) -> RunState:
    """The attempt of a job that SLURM took away without a word; raises where that was one too many."""
    message = "the job ended without a word from it: a node went down, or SLURM stopped it"
    failure = Failure(rank=-1, message=message, traceback="", log=JOB_DIR)
    known = state.end_attempt(known, exit_code=EXIT_RETRY, failure=failure, last_step=newest_step(run_dir))
    decision = _decision(run_dir, config, known, place, lost_node=True)
    if decision.verdict is not Verdict.REQUEUE:
        conclude(run_dir, known, decision)
        raise EfflaunchError(f"{message}; {decision.reason}")
    return decided(known, decision)


def settle(run_dir: Path, place: SlurmPlace) -> Verdict:
    """Close the attempt that the agents have just run, and say what follows."""
    config = read_run(run_dir).config
    keep_private(config.run.private)
    known = read_state(run_dir)
    assert known is not None and known.attempts, "written by start"
    lost_node = False
    if known.attempts[-1].ended is None:
        exit_code, failure, lost_node = gather(
            run_dir, config, known.attempts[-1].number, num_nodes=place.num_nodes, output=Path(JOB_DIR) / f"{place.job}.out"
        )
        known = state.end_attempt(known, exit_code=exit_code, failure=failure, last_step=newest_step(run_dir))
    decision = _decision(run_dir, config, known, place, lost_node=lost_node)
    conclude(run_dir, known, decision)
    tell(run_dir, known.attempts[-1], decision.reason)
    return decision.verdict


def _decision(run_dir: Path, config: Config, known: RunState, place: SlurmPlace, *, lost_node: bool) -> Decision:
    slurm = config.launcher.slurm
    limits = Limits(
        max_restarts=config.launcher.max_restarts,
        max_preemptions=slurm.max_preemptions,
        requeue=slurm.requeue,
        start_step=known.step_before,
    )
    mine = known.attempts[known.attempts_before :]
    outcomes = [Outcome(exit_code=EXIT_RETRY if item.exit_code is None else item.exit_code, step=item.last_step) for item in mine]
    return decide(outcomes, limits, cancelled=cancel_file(run_dir, place.job).exists(), lost_node=lost_node)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
