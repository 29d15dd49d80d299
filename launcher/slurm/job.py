"""What a batch script asks on its first node: `python -m efflaunch.launcher.slurm.job prepare|start|settle`.

prepare OVERRIDES: make the run directory of a script submitted by hand; prints it.
start RUN_DIR: begin an attempt; prints where its nodes meet.
settle RUN_DIR: what became of the attempt, and what follows; the exit code is a decide.Verdict.
"""

from __future__ import annotations

import json
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import FrameType

from ...errors import EXIT_DONE, EXIT_RETRY, EXIT_USER, EfflaunchError
from .. import state, worker
from ..agent import read_failure
from ..config import Config
from ..env import SlurmPlace, slurm_place
from ..files import tail_lines
from ..metrics_file import newest_step
from ..restarts import Outcome, RankReport, first_failure
from ..rundir import attempt_dir, keep_private, lock_in_time, make_run_dir, read_run, release, store_config
from ..signals import STOP_SIGNALS
from ..state import Attempt, Failure, RunState, read_state, write_state
from .address import head_address, head_port
from .decide import Decision, Limits, Verdict, decide
from .files import Meeting, cancel_file, forget_stops, stop_file, write_submission
from .script import JOB_DIR

_LOG_TAIL_LINES = 30
_STATES = {Verdict.DONE: state.DONE, Verdict.STOP: state.PREEMPTED, Verdict.REQUEUE: state.QUEUED, Verdict.AGAIN: state.STARTING}


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
    revision, changes = store_config(run_dir, config)
    known = read_state(run_dir)
    attempts = known.attempts if known else ()
    world_size = config.cluster.num_nodes * config.cluster.ranks_per_node
    fresh = state.new_state(world_size=world_size, revision=revision, attempts=attempts)
    step = newest_step(run_dir)
    write_state(run_dir, replace(fresh, state=state.QUEUED, attempts_before=len(attempts), step_before=step))
    return revision, changes


def start(run_dir: Path, place: SlurmPlace) -> Meeting:
    """Begin the next attempt. EfflaunchError, with state.json saying so, where it must not begin."""
    # Before anything is written: another efflaunch may be running there.
    release(lock_in_time(run_dir))
    config = read_run(run_dir).config
    keep_private(config.run.private)
    known = read_state(run_dir)
    assert known is not None, "whoever submits a job writes state.json first"
    known = replace(known, job=str(place.job), host=place.name)
    if _is_open(known):
        known = _close_lost(run_dir, config, known, place)
    interface = config.launcher.slurm.interface
    try:
        address = head_address(place.name, interface)
    except EfflaunchError as error:
        failure = Failure(rank=-1, message=str(error), traceback="", log=JOB_DIR, is_user_error=True)
        known = replace(known, attempts=(*known.attempts, Attempt(number=len(known.attempts) + 1, started=time.time())))
        known = state.end_attempt(known, exit_code=EXIT_USER, failure=failure, last_step=newest_step(run_dir))
        _conclude(run_dir, known, Decision(verdict=Verdict.USER, reason="would fail again in the same way"))
        raise
    attempt = Attempt(number=len(known.attempts) + 1, started=time.time())
    write_state(run_dir, replace(known, state=state.STARTING, exit_code=None, ended=None, attempts=(*known.attempts, attempt)))
    return Meeting(attempt.number, address, head_port(place.job, address), int(config.launcher.start_timeout_s))


def _is_open(known: RunState) -> bool:
    return len(known.attempts) > known.attempts_before and known.attempts[-1].ended is None


def _close_lost(run_dir: Path, config: Config, known: RunState, place: SlurmPlace) -> RunState:
    """The attempt of a job that SLURM took away without a word; raises where that was one too many."""
    message = "the job ended without a word from it: a node went down, or SLURM stopped it"
    failure = Failure(rank=-1, message=message, traceback="", log=JOB_DIR)
    known = state.end_attempt(known, exit_code=EXIT_RETRY, failure=failure, last_step=newest_step(run_dir))
    decision = _decision(run_dir, config, known, place, lost_node=True)
    if decision.verdict is not Verdict.REQUEUE:
        _conclude(run_dir, known, decision)
        raise EfflaunchError(f"{message}; {decision.reason}")
    return _decided(known, decision)


def settle(run_dir: Path, place: SlurmPlace) -> Verdict:
    """Close the attempt that the agents have just run, and say what follows."""
    config = read_run(run_dir).config
    keep_private(config.run.private)
    known = read_state(run_dir)
    assert known is not None and known.attempts, "written by start"
    lost_node = False
    if known.attempts[-1].ended is None:
        exit_code, failure, lost_node = _gather(run_dir, config, known.attempts[-1].number, place)
        known = state.end_attempt(known, exit_code=exit_code, failure=failure, last_step=newest_step(run_dir))
    decision = _decision(run_dir, config, known, place, lost_node=lost_node)
    _conclude(run_dir, known, decision)
    _tell(run_dir, known.attempts[-1], decision)
    return decision.verdict


def _gather(run_dir: Path, config: Config, number: int, place: SlurmPlace) -> tuple[int, Failure, bool]:
    """(exit code, first failure, whether a node said nothing) from what every node and rank left."""
    logs = attempt_dir(run_dir, number)
    answers = {node: _node_report(logs / f"node-{node}.json") for node in range(place.num_nodes)}
    lost = [node for node, answer in answers.items() if answer is None]
    reports = list(_rank_reports(logs, answers, config.cluster.ranks_per_node))
    first = first_failure(reports)
    if first is not None and (first.record is not None or first.exit_code is not None):
        failure = read_failure(run_dir, number, first)
        return (EXIT_USER if failure.is_user_error else EXIT_RETRY), failure, bool(lost)
    if any(answer and answer["out_of_time"] for answer in answers.values()):
        message = f"the ranks did not save within launcher.grace_s={config.launcher.grace_s:g} s and were killed"
        return EXIT_RETRY, Failure(rank=-1, message=message, traceback="", log=str(attempt_dir(Path(), number))), bool(lost)
    names = ", ".join(f"node {node} of the job" for node in lost) or "an agent"
    output = Path(JOB_DIR) / f"{place.job}.out"
    failure = Failure(
        rank=-1,
        message=f"{names} ended without a word: lost, killed, or never there",
        traceback="\n".join(tail_lines(run_dir / output, _LOG_TAIL_LINES)),
        log=str(output),
    )
    return EXIT_RETRY, failure, bool(lost)


def _node_report(path: Path) -> dict[str, object] | None:
    return dict(json.loads(path.read_text())) if path.is_file() else None


def _rank_reports(logs: Path, answers: dict[int, dict[str, object] | None], ranks_per_node: int) -> Iterator[RankReport]:
    for node, answer in answers.items():
        told: list[dict[str, object]] = list(answer["ranks"]) if answer else []  # type: ignore[call-overload]
        known = {int(str(item["rank"])): item for item in told}
        for rank in range(node * ranks_per_node, (node + 1) * ranks_per_node):
            record = worker.read_error(logs, rank)
            if rank in known:
                yield RankReport(**{**known[rank], "record": record})  # type: ignore[arg-type]
            elif record is not None:
                yield RankReport(rank=rank, exit_code=None, stopped_by_agent=True, record=record)


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


def _decided(known: RunState, decision: Decision) -> RunState:
    *earlier, last = known.attempts
    goes_on = decision.verdict in (Verdict.AGAIN, Verdict.REQUEUE)
    return replace(known, attempts=(*earlier, replace(last, decision=decision.reason, restarted=goes_on)))


def _conclude(run_dir: Path, known: RunState, decision: Decision) -> None:
    """Write state.json for what follows."""
    known = replace(_decided(known, decision), state=_STATES.get(decision.verdict, state.FAILED))
    if decision.verdict not in (Verdict.AGAIN, Verdict.REQUEUE):
        known = replace(known, exit_code=int(decision.verdict), ended=time.time())
    write_state(run_dir, known)


def _tell(run_dir: Path, attempt: Attempt, decision: Decision) -> None:
    """The job's own output says what happened, the error last and in full."""
    if attempt.failure is None:
        print(f"attempt {attempt.number}: {decision.reason}, after step {attempt.last_step}", flush=True)
        return
    print(f"attempt {attempt.number} failed after step {attempt.last_step}: {decision.reason}", flush=True)
    if attempt.failure.traceback:
        print(f"{attempt.failure.traceback}\n(log: {run_dir / attempt.failure.log})", flush=True)
    print(f"efflaunch: {attempt.failure.message}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
