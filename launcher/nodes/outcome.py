"""Gathers how an attempt on several nodes ended, from what their agents and ranks left in its directory, and state.json with it."""

from __future__ import annotations

import json
import signal
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from ...errors import EXIT_RETRY, EXIT_USER
from ..agent import worker
from ..agent.agent import read_failure
from ..agent.hang_watch import read_hang
from ..agent.restart_policy import RankReport, first_failure, lost_a_peer
from ..config.run_config import Config
from ..rundir import state
from ..rundir.metrics_index import newest_step
from ..rundir.run_dir import attempt_dir, store_config
from ..rundir.small_files import tail_lines
from ..rundir.state import Attempt, Failure, RunState, mend_state, read_state, write_state
from .faulty_nodes import blame
from .next_action import Decision, Verdict

_LOG_TAIL_LINES = 30
_STATES = {Verdict.DONE: state.DONE, Verdict.STOP: state.PREEMPTED, Verdict.REQUEUE: state.QUEUED, Verdict.AGAIN: state.STARTING}


def store_queued(run_dir: Path, config: Config) -> tuple[int, list[str]]:
    """Make `config` the run's, and state.json that of one about to be started; (revision, what changed)."""
    mended = mend_state(run_dir)
    if mended is not None:
        print(mended, flush=True)
    revision, changes = store_config(run_dir, config)
    run_state = read_state(run_dir)
    attempts = run_state.attempts if run_state else ()
    world_size = config.cluster.num_nodes * config.cluster.ranks_per_node
    fresh = state.new_state(world_size=world_size, revision=revision, attempts=attempts)
    step = newest_step(run_dir)
    write_state(run_dir, replace(fresh, state=state.QUEUED, attempts_before=len(attempts), step_before=step))
    return revision, changes


def is_open(run_state: RunState) -> bool:
    """Return whether an attempt of this launch was started and never ended."""
    return bool(run_state.launch_attempts) and run_state.attempts[-1].ended is None


def close_attempt(
    run_dir: Path, run_state: RunState, exit_code: int, failure: Failure | None, *, lost: Sequence[str], ranks_per_node: int
) -> RunState:
    """End the last attempt, with the nodes that are `lost` and those it failed on."""
    blamed = blame(failure, hosts=run_state.attempts[-1].hosts, lost=lost, ranks_per_node=ranks_per_node)
    run_state = state.end_attempt(run_state, exit_code=exit_code, failure=failure, last_step=newest_step(run_dir))
    *earlier, last = run_state.attempts
    return replace(run_state, attempts=(*earlier, replace(last, lost=tuple(lost), blamed=blamed)))


def decided(run_state: RunState, decision: Decision) -> RunState:
    """`run_state` with what follows its last attempt."""
    *earlier, last = run_state.attempts
    starts_again = decision.verdict in (Verdict.AGAIN, Verdict.REQUEUE)
    return replace(run_state, attempts=(*earlier, replace(last, decision=decision.reason, restarted=starts_again)))


def conclude(run_dir: Path, run_state: RunState, decision: Decision) -> None:
    """Write state.json for what follows, as far as there is room for it: the exit code says it too."""
    run_state = replace(decided(run_state, decision), state=_STATES.get(decision.verdict, state.FAILED))
    if decision.verdict not in (Verdict.AGAIN, Verdict.REQUEUE):
        run_state = replace(run_state, exit_code=int(decision.verdict), ended=time.time())
    try:
        write_state(run_dir, run_state)
    except OSError as error:
        # Where the next attempt finds no room either, that ends the job.
        print(f"{run_dir / state.STATE_FILE} cannot be written: {error.strerror}", file=sys.stderr, flush=True)


def gather(
    run_dir: Path, config: Config, number: int, *, num_nodes: int, output: Path, gone: Mapping[int, str] | None = None
) -> tuple[int, Failure, bool]:
    """(exit code, first failure, whether a node said nothing) from what every node and rank left.

    `output`: inside the run directory, what the job itself printed. `gone`: nodes the scheduler knows to be lost, and why.
    """
    logs = attempt_dir(run_dir, number)
    answers = {node: _node_report(logs / f"node-{node}.json") for node in range(num_nodes)}
    lost = [node for node, answer in answers.items() if answer is None]
    hang = read_hang(run_dir, number)
    if hang is not None:
        return EXIT_RETRY, hang, bool(lost or gone)
    reports = list(_rank_reports(logs, answers, config.cluster.ranks_per_node))
    first = first_failure(reports)
    is_cause = first is not None and (first.record is not None or first.exit_code is not None)
    if first is not None and gone and (first.record is None or lost_a_peer(first.record)):
        # Ranks elsewhere only saw that it went.
        is_cause = False
    if first is not None and is_cause:
        failure = read_failure(run_dir, number, first)
        return (EXIT_USER if failure.is_user_error else EXIT_RETRY), failure, bool(lost)
    if not gone and any(answer and answer["out_of_time"] for answer in answers.values()):
        at_once = any(answer and answer["out_of_time"] == signal.SIGQUIT for answer in answers.values())
        in_time = f"did not save within launcher.grace_s={config.launcher.grace_s:g} s and were killed"
        message = f"the ranks {'were killed at once, as asked' if at_once else in_time}"
        return EXIT_RETRY, Failure(rank=-1, message=message, traceback="", log=str(attempt_dir(Path(), number))), bool(lost)
    return EXIT_RETRY, _lost_failure(run_dir, lost, output, gone or {}), bool(lost or gone)


def _lost_failure(run_dir: Path, lost: list[int], output: Path, gone: Mapping[int, str]) -> Failure:
    names = ", ".join(f"node {node} of the job" for node in lost) or "an agent"
    why = "; ".join(gone.values()) or "lost, killed, or never there"
    return Failure(
        rank=-1,
        message=f"{names} ended without a word: {why}",
        traceback="\n".join(tail_lines(run_dir / output, _LOG_TAIL_LINES)),
        log=str(output),
    )


def _node_report(path: Path) -> dict[str, object] | None:
    return dict(json.loads(path.read_text())) if path.is_file() else None


def _rank_reports(logs: Path, answers: dict[int, dict[str, object] | None], ranks_per_node: int) -> Iterator[RankReport]:
    for node, answer in answers.items():
        listed: list[dict[str, object]] = list(answer["ranks"]) if answer else []  # type: ignore[call-overload]
        by_rank = {int(str(item["rank"])): item for item in listed}
        for rank in range(node * ranks_per_node, (node + 1) * ranks_per_node):
            record = worker.read_error(logs, rank)
            if rank in by_rank:
                yield RankReport(**{**by_rank[rank], "record": record})  # type: ignore[arg-type]
            elif record is not None:
                yield RankReport(rank=rank, exit_code=None, stopped_by_agent=True, record=record)


def describe_end(run_dir: Path, attempt: Attempt, reason: str) -> list[str]:
    """Describe how the attempt ended, the error last and in full."""
    if attempt.failure is None:
        return [f"attempt {attempt.number}: {reason}, after step {attempt.last_step}"]
    lines = [f"attempt {attempt.number} failed after step {attempt.last_step}: {reason}"]
    if attempt.failure.traceback:
        lines.append(f"{attempt.failure.traceback}\n(log: {run_dir / attempt.failure.log})")
    return [*lines, f"efflaunch: {attempt.failure.message}"]


def print_end(run_dir: Path, attempt: Attempt, reason: str) -> None:
    """Print how the attempt ended to the job's own output."""
    *lines, last = describe_end(run_dir, attempt, reason)
    if lines:
        print(*lines, sep="\n", flush=True)
    print(last, file=sys.stdout if attempt.failure is None else sys.stderr, flush=True)
