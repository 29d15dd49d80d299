"""Answers a batch script on its first node: `python -m efflaunch.launcher.slurm.job prepare|start|settle`.

prepare OVERRIDES: make the run directory of a script submitted by hand; prints it.
start RUN_DIR NODES: begin an attempt; prints where its nodes meet, how many they are, and which. 77: other nodes are needed.
settle RUN_DIR NODES: what became of the attempt, and what follows; the exit code is a decide.Verdict.

NODES are those the job has at that moment: one that went down is no longer among them.
"""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import FrameType

from ...errors import EXIT_DONE, EXIT_RETRY, EXIT_USER, ConfigError, EfflaunchError
from ...utils.atomic_files import file_errors_named, write_atomic
from ..agent.restart_policy import lost_a_peer
from ..agent.signals import STOP_SIGNALS
from ..config.node_range import node_range
from ..config.run_config import Config
from ..elastic_nodes import Sizing, size_for
from ..env import SlurmPlace, slurm_place
from ..nodes.address import head_address, head_port
from ..nodes.faulty_nodes import excluded_names, leave_out
from ..nodes.meeting import Meeting
from ..nodes.next_action import Decision, Verdict, decide_next
from ..nodes.outcome import close_attempt, conclude, decided, gather, is_open, print_end, store_queued
from ..output import lenient_output
from ..rundir import state
from ..rundir.lock import lock_in_time, release
from ..rundir.metrics_index import newest_step
from ..rundir.run_dir import attempt_dir, keep_private, make_run_dir, read_run, write_attempt
from ..rundir.state import Attempt, Failure, RunState, read_state, write_state
from .control import partition_nodes
from .files import cancel_file, exclude_file, forget_stops, stop_file, write_submission
from .hosts import expand_hosts, lost_hosts
from .script import JOB_DIR


def main(arguments: list[str]) -> int:
    """Run one of the three; the return value is the exit code."""
    what, *rest = arguments
    # What `prepare` and `start` print is for the script, which has to have it.
    lenient_output(*(("stdout", "stderr") if what == "settle" else ("stderr",)))
    try:
        with file_errors_named():
            return _answer(what, rest, slurm_place())
    except EfflaunchError as error:
        print(f"efflaunch: {error}", file=sys.stderr, flush=True)
        return error.exit_code


def _answer(what: str, rest: list[str], place: SlurmPlace) -> int:
    if what == "prepare":
        print(prepare(rest, place))
        return EXIT_DONE
    run_dir, nodes = Path(rest[0]), "".join(rest[1:]).replace("(null)", "")
    _keep_stop_signals(run_dir, place)
    if what == "settle":
        return settle(run_dir, place, nodes)
    meeting, run_state = start(run_dir, place, nodes), read_state(run_dir)
    assert run_state is not None, "written by start"
    print(meeting, run_state.attempts[-1].num_nodes, ",".join(run_state.attempts[-1].hosts))
    return EXIT_DONE


def _keep_stop_signals(run_dir: Path, place: SlurmPlace) -> None:
    """A stop signal that comes while no agent runs is left as a file for the next one."""

    def keep(number: int, frame: FrameType | None) -> None:
        path = stop_file(run_dir, place.word, place.restart)
        try:
            path.touch()
        except OSError as error:
            print(f"{path} cannot be written: {error.strerror}; the stop signal is lost", file=sys.stderr, flush=True)

    for number in STOP_SIGNALS:
        signal.signal(number, keep)


def prepare(overrides: list[str], place: SlurmPlace) -> Path:
    """The run directory of a script submitted by hand; made by the job's first life, known to its later ones."""
    from ..checks import check_data
    from ..config.compose import compose

    given = {item.partition("=")[0].lstrip("+") for item in overrides}
    mine = [f"run.id=job-{place.job}", "launcher=slurm"]
    mine += [] if "launcher.nodes" in given else [f"cluster.num_nodes={place.num_nodes}"]
    config = compose([item for item in mine if item.partition("=")[0] not in given] + overrides)
    assert config.run.id is not None, "given above"
    run_dir = (Path(config.run.root) / config.run.id).resolve()
    run_state = read_state(run_dir)
    if run_state is None or run_state.job != place.word:
        if run_state is not None:
            release(lock_in_time(run_dir))
        stdout, sys.stdout = sys.stdout, sys.stderr  # only the directory is for the script to read
        try:
            check_data(config)
        finally:
            sys.stdout = stdout
        queue(run_dir, config)
        write_submission(run_dir, place.word)
    return run_dir


def queue(run_dir: Path, config: Config) -> tuple[int, list[str]]:
    """Make or revise the run directory for a job that is about to be submitted; (revision, what changed)."""
    make_run_dir(run_dir, private=config.run.private)
    (run_dir / JOB_DIR).mkdir(exist_ok=True)
    forget_stops(run_dir)
    return store_queued(run_dir, config)


def start(run_dir: Path, place: SlurmPlace, nodes: str = "") -> Meeting:
    """Begin the next attempt, on those of `nodes` (a list in SLURM's own form) that state.json then names.

    EfflaunchError, with state.json saying so, where it must not begin; its exit code is Verdict.REQUEUE where other nodes
    would do.
    """
    # Before anything is written: another efflaunch may be running there.
    release(lock_in_time(run_dir))
    config = read_run(run_dir).config
    keep_private(config.run.private)
    run_state = read_state(run_dir)
    assert run_state is not None, "whoever submits a job writes state.json first"
    run_state = replace(run_state, job=place.word, host=place.name)
    if is_open(run_state):
        run_state = _close_lost(run_dir, config, run_state, place)
    try:
        sizing, hosts = _sizing(config, run_state, place, nodes)
        address = head_address(place.name, config.launcher.slurm.interface)
    except EfflaunchError as error:
        _refuse(run_dir, run_state, place, Failure(rank=-1, message=str(error), traceback="", log=JOB_DIR, is_user_error=True))
        raise
    if sizing.waits:
        failure = Failure(rank=-1, message=f"not started: {sizing.reason}", traceback="", log=JOB_DIR)
        raise _NotHere(failure.message, _refuse(run_dir, run_state, place, failure))
    return _begin(run_dir, run_state, place, sizing, hosts, address)


class _NotHere(EfflaunchError):
    """Raised where these nodes will not do; the exit code says what follows."""

    def __init__(self, message: str, decision: Decision) -> None:
        super().__init__(f"{message}; {decision.reason}")
        self.exit_code = int(decision.verdict)


def _sizing(config: Config, run_state: RunState, place: SlurmPlace, nodes: str) -> tuple[Sizing, list[str]]:
    """Choose how many nodes the attempt takes, and which. ConfigError where the job has fewer or more than were asked for."""
    wanted = node_range(config)
    if place.num_nodes not in wanted:
        available, hint = (
            f"a job of {place.num_nodes} nodes",
            f"sbatch --nodes={str(wanted).replace(':', '-')}, or launcher.nodes={place.num_nodes}",
        )
        raise ConfigError(
            "launcher.nodes" if config.launcher.nodes else "cluster.num_nodes", found=available, expected=str(wanted), hint=hint
        )
    hosts = _usable(run_state, place, nodes)
    if hosts[:1] != [place.name]:
        # This is where the batch script lives, and where SLURM puts the first task.
        return Sizing(num_nodes=0, config=config, reason=f"the job's first node, {place.name}, is left out"), []
    sizing = size_for(config, len(hosts))
    return sizing, hosts[: sizing.num_nodes]


def _usable(run_state: RunState, place: SlurmPlace, nodes: str) -> list[str]:
    """The job's nodes but those that are left out, or were lost since SLURM gave them."""
    mine = run_state.launch_attempts
    lost = {host for attempt in mine if attempt.place == place.life for host in attempt.lost}
    names = expand_hosts(nodes or place.hosts) or [place.name]
    return [name for name in names if name not in run_state.excluded and name not in lost]


def _begin(run_dir: Path, run_state: RunState, place: SlurmPlace, sizing: Sizing, hosts: list[str], address: str) -> Meeting:
    config, number = sizing.config, len(run_state.attempts) + 1
    changes = write_attempt(run_dir, number, config)
    world_size = sizing.num_nodes * config.cluster.ranks_per_node
    attempt = Attempt(
        number=number, started=time.time(), num_nodes=sizing.num_nodes, world_size=world_size, hosts=tuple(hosts), place=place.life
    )
    run_state = replace(run_state, state=state.STARTING, exit_code=None, ended=None, world_size=world_size)
    write_state(run_dir, replace(run_state, attempts=(*run_state.attempts, attempt)))
    # What is printed is for the script to read.
    print(f"attempt {number} on {sizing.reason}: {', '.join(hosts)}", *changes, sep="\n  ", file=sys.stderr, flush=True)
    return Meeting(number, address, head_port(place.job, address), int(config.launcher.start_timeout_s))


def _refuse(run_dir: Path, run_state: RunState, place: SlurmPlace, failure: Failure) -> Decision:
    """Record an attempt that ended before it began, and what follows."""
    attempt = Attempt(number=len(run_state.attempts) + 1, started=time.time(), place=place.life)
    run_state = replace(run_state, attempts=(*run_state.attempts, attempt))
    exit_code = EXIT_USER if failure.is_user_error else EXIT_RETRY
    run_state = state.end_attempt(run_state, exit_code=exit_code, failure=failure, last_step=newest_step(run_dir))
    decision = _decision(run_dir, read_run(run_dir).config, run_state, place, leaves=True)
    conclude(run_dir, run_state, decision)
    return decision


def _close_lost(run_dir: Path, config: Config, run_state: RunState, place: SlurmPlace) -> RunState:
    """The attempt of a job that SLURM took away without a word; raises where that was one too many."""
    message = "the job ended without a word from it: a node went down, or SLURM stopped it"
    failure = Failure(rank=-1, message=message, traceback="", log=JOB_DIR)
    run_state = state.end_attempt(run_state, exit_code=EXIT_RETRY, failure=failure, last_step=newest_step(run_dir))
    decision = _decision(run_dir, config, run_state, place, leaves=True)
    if decision.verdict is not Verdict.REQUEUE:
        conclude(run_dir, run_state, decision)
        raise EfflaunchError(f"{message}; {decision.reason}")
    return decided(run_state, decision)


def settle(run_dir: Path, place: SlurmPlace, nodes: str = "") -> Verdict:
    """Close the attempt that the agents have just run, and say what follows. `nodes`: those the job still has."""
    config = read_run(run_dir).config
    keep_private(config.run.private)
    run_state = read_state(run_dir)
    assert run_state is not None and run_state.attempts, "written by start"
    lost_node = False
    if run_state.attempts[-1].ended is None:
        run_state, lost_node = _close(run_dir, config, run_state, place, nodes)
    run_state, left_out = _leave_out(run_dir, config, run_state, place)
    leaves = (lost_node or left_out) and not _enough_left(config, run_state, place, nodes)
    decision = _decision(run_dir, config, run_state, place, leaves=leaves)
    conclude(run_dir, run_state, decision)
    print_end(run_dir, run_state.attempts[-1], decision.reason)
    return decision.verdict


def _close(run_dir: Path, config: Config, run_state: RunState, place: SlurmPlace, nodes: str) -> tuple[RunState, bool]:
    """(state with the last attempt ended, whether a node of it is gone) from what its nodes left."""
    attempt = run_state.attempts[-1]
    output = Path(JOB_DIR) / f"{place.job}.out"
    exit_code, failure, silent = gather(run_dir, config, attempt.number, num_nodes=attempt.num_nodes, output=output)
    reported = [(attempt_dir(run_dir, attempt.number) / f"node-{node}.json").is_file() for node in range(attempt.num_nodes)]
    lost = lost_hosts(attempt.hosts, expand_hosts(nodes), reported)
    if lost and lost_a_peer({"message": failure.message}):
        # What the ranks that are left say of it.
        failure = replace(failure, rank=-1, message=f"{', '.join(lost)} ended without a word: lost or killed")
    ranks_per_node = config.cluster.ranks_per_node
    return close_attempt(run_dir, run_state, exit_code, failure, lost=lost, ranks_per_node=ranks_per_node), silent


def _leave_out(run_dir: Path, config: Config, run_state: RunState, place: SlurmPlace) -> tuple[RunState, bool]:
    """(state, whether a node of the last attempt is left out from now on); the batch script reads which from a file."""
    slurm, before = config.launcher.slurm, run_state
    run_state, new = leave_out(run_state, slurm, lambda names: _is_enough(config, place, names))
    if new:
        try:
            write_atomic(exclude_file(run_dir), ",".join(excluded_names(run_state, slurm)))
        except OSError as error:
            print(
                f"efflaunch: {exclude_file(run_dir)} cannot be written, no node is left out: {error.strerror}", file=sys.stderr, flush=True
            )
            return before, False
    for host, why in new.items():
        print(f"{host} is left out from now on: {why}", flush=True)
    return run_state, bool(new)


def _is_enough(config: Config, place: SlurmPlace, excluded: Sequence[str]) -> bool:
    """Return whether the partition has nodes enough without these; True where SLURM cannot be asked from here."""
    names = partition_nodes(place.partition)
    return names is None or len(names - set(excluded)) >= node_range(config).least


def _enough_left(config: Config, run_state: RunState, place: SlurmPlace, nodes: str) -> bool:
    """Tell whether the run can resume at once, on the nodes that are left of this job."""
    return node_range(config).least < node_range(config).most and not _sizing(config, run_state, place, nodes)[0].waits


def _decision(run_dir: Path, config: Config, run_state: RunState, place: SlurmPlace, *, leaves: bool) -> Decision:
    """`leaves`: not again on the nodes of this job."""
    launcher, cancelled = config.launcher, cancel_file(run_dir, place.word).exists()
    return decide_next(run_state, launcher, launcher.slurm, cancelled=cancelled, lost_node=leaves)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
