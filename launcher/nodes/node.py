"""The agent of one node among several.

Meets the agents of the other nodes in a store, looks with them whether all are fit, then runs one attempt of this
node's ranks. What became of them stands in `logs/attempt-K/node-N.json`; nodes.outcome reads all of these.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...errors import EXIT_DONE, EXIT_PREEMPTED, EXIT_USER, EfflaunchError
from ...utils.atomic_files import file_errors_named
from ..agent import worker
from ..agent.agent import Agent
from ..agent.hang_watch import Others
from ..agent.signals import StopFlag
from ..config.run_config import LauncherConfig
from ..env import rank_environment
from ..rundir import state
from ..rundir.lock import Presence, lock_in_time, release
from ..rundir.metrics_index import newest_step
from ..rundir.metrics_reader import MetricsFollower
from ..rundir.run_dir import attempt_dir, read_attempt
from ..rundir.small_files import write_json
from ..rundir.state import Failure
from ..stop_forecast import GraceWatch
from .address import address_towards, interface_of
from .gather_ends import Ends
from .meeting import Meeting
from .node_place import NodePlace
from .preflight import NodeFacts, bad_hosts, check_nodes, look, mark, table, unfit

if TYPE_CHECKING:
    from torch.distributed import TCPStore
    from torch.distributed.elastic.rendezvous.static_tcp_rendezvous import StaticTCPRendezvous

    from ..agent.elastic import RankAgent

_LOOK_S = 5.0


def take_part(run_dir: Path, meeting: Meeting, place: NodePlace, entry: str, early: StopFlag, stop_asked: Callable[[], bool]) -> int:
    """Run one attempt on this node; returns 0 where its ranks ended together, 75 and 93 where none was to start, else 1.

    `early` takes stop signals from the start of the process on; `stop_asked`: whether one came, or a person spoke,
    before any agent could hear it.
    """
    try:
        with file_errors_named():
            visit = Visit(run_dir, meeting, place)
            try:
                verdict = visit.verdict(lambda: early.requested or stop_asked())
                return verdict if verdict is not None else run_attempt(visit, entry, early)
            finally:
                visit.leave()
    except EfflaunchError as error:
        print(f"efflaunch: {error}", file=sys.stderr, flush=True)
        return error.exit_code


class Visit:
    """The store, and what the nodes tell each other before the ranks are started."""

    def __init__(self, run_dir: Path, meeting: Meeting, place: NodePlace) -> None:
        self.run_dir, self.meeting, self.place = run_dir, meeting, place
        self.timeout_s = meeting.timeout_s
        self.address = address_towards(meeting.address)
        self.interface = interface_of(self.address)
        self.lock = lock_in_time(run_dir) if place.node == 0 else None
        self.presence = Presence(self.lock) if self.lock is not None else None
        self.store = self._open()
        self.ends = Ends(self.store, place.num_nodes)

    def _open(self) -> TCPStore:
        from torch.distributed import DistError

        from ..agent.elastic import open_store

        where, place = self.meeting, self.place
        try:
            return open_store(where.address, where.port, node=place.node, num_nodes=place.num_nodes, timeout_s=self.timeout_s)
        except (DistError, OSError) as error:
            role = "serve" if place.node == 0 else "reach"
            via = f"from {self.address} on {self.interface}"
            message = f"node {place.name} cannot {role} the meeting point {where.address}:{where.port} {via}: {error}"
            raise EfflaunchError(message) from error

    def verdict(self, stop_asked: Callable[[], bool]) -> int | None:
        """Return None where all nodes are to start their ranks, else the exit code. The head decides, and prints the table."""
        facts = look(
            self.run_dir,
            place=self.place,
            address=self.address,
            interface=self.interface,
            attempt=self.meeting.attempt,
        )
        self._set(f"facts-{self.place.node}", asdict(facts))
        if self.place.node == 0:
            return self._judge(stop_asked)
        head_clock = self._get("clock")
        self._set(f"clock-{self.place.node}", time.time() - head_clock)
        code: int | None = self._get("verdict")
        self._set(f"heard-{self.place.node}", True)
        return code

    def _judge(self, stop_asked: Callable[[], bool]) -> int | None:
        run_dir, nodes = self.run_dir, range(self.place.num_nodes)
        answers = [self._get_or_none(f"facts-{node}") for node in nodes]
        self._set("clock", time.time())
        all_facts = [
            NodeFacts(**{**answer, "clock_s": (self._get_or_none(f"clock-{node}") or 0.0) if node else 0.0}) if answer else None
            for node, answer in zip(nodes, answers, strict=True)
        ]
        marks = [mark(run_dir, self.place.folder, self.meeting.attempt, node) for node in nodes]
        rows = check_nodes(
            all_facts, marks=[path.exists() for path in marks], num_nodes=read_attempt(run_dir, self.meeting.attempt).cluster.num_nodes
        )
        for path in marks:
            path.unlink(missing_ok=True)
        text = table(rows)
        print(text, flush=True)
        verdict = None
        if any(row.problems for row in rows):
            verdict = EXIT_USER
            _record(run_dir, EXIT_USER, _refusal(text, bad_hosts(rows), self.place), unfit(rows))
        elif stop_asked():
            # Nothing runs: the last checkpoint is all there is to save.
            verdict = EXIT_PREEMPTED
            _record(run_dir, EXIT_PREEMPTED, None)
        self._set("verdict", verdict)
        if verdict is not None:
            # The store ends with the head.
            for facts in all_facts[1:]:
                if facts is not None:
                    self._get_or_none(f"heard-{facts.node}")
        return verdict

    def leave(self) -> None:
        """The run directory is free for the next attempt."""
        if self.lock is not None:
            release(self.lock)

    def _set(self, key: str, value: Any) -> None:
        self.store.set(f"visit/{key}", json.dumps(value))

    def _get(self, key: str) -> Any:
        # Twice: the head itself waits so long for a node that is not there.
        self.store.wait([f"visit/{key}"], timedelta(seconds=2 * self.timeout_s))
        return json.loads(self.store.get(f"visit/{key}"))

    def _get_or_none(self, key: str) -> Any:
        from torch.distributed import DistError

        try:
            self.store.wait([f"visit/{key}"], timedelta(seconds=self.timeout_s))
        except DistError:
            return None
        return json.loads(self.store.get(f"visit/{key}"))


def _refusal(text: str, hosts: list[str], place: NodePlace) -> Failure:
    hint = f"\n  Try: mend them, or leave them out: {place.exclude_key}=[{','.join(hosts)}]" if hosts else ""
    return Failure(rank=-1, message=f"nodes that cannot do their part:\n{text}{hint}", traceback="", log=place.folder, is_user_error=True)


def _record(run_dir: Path, exit_code: int, failure: Failure | None, unfit_nodes: dict[int, str] | None = None) -> None:
    run_state = state.read_state(run_dir)
    assert run_state is not None, "written before agents are started"
    hosts = dict(enumerate(run_state.attempts[-1].hosts))
    blamed = {hosts[node]: why for node, why in (unfit_nodes or {}).items() if node in hosts}
    ended = state.end_attempt(run_state, exit_code=exit_code, failure=failure, last_step=newest_step(run_dir))
    state.write_state(run_dir, replace(ended, attempts=(*ended.attempts[:-1], replace(ended.attempts[-1], blamed=blamed))))


def run_attempt(visit: Visit, entry: str, early: StopFlag) -> int:
    """Run this node's ranks once: 0 where they ended by themselves and well, else not; node-N.json says more."""
    run_dir, place, number = visit.run_dir, visit.place, visit.meeting.attempt
    config = read_attempt(run_dir, number)
    agent = Agent(run_dir, entry, peers=NodePeers(visit, config.launcher), config=config)
    # Handed to the ranks as soon as they run: the nodes may have been asked at different moments.
    agent.stopping = agent.stopping or early.requested
    os.environ.update(rank_environment(config, visit.interface))
    worker.preload(entry)
    attempt_dir(run_dir, number).mkdir(parents=True, exist_ok=True)
    agent.write(state=state.RUNNING)
    code, failure = agent.run_ranks(number)
    _report(agent, place, number, code)
    if failure is not None:
        if place.ends_with_others:
            visit.ends.wait_for_others()
        print(f"efflaunch: {failure.message} (log: {run_dir / failure.log})", file=sys.stderr, flush=True)
        return code
    if agent.peers.writes_state:
        ended = state.end_attempt(agent.state, exit_code=code, failure=None, last_step=newest_step(run_dir))
        agent.write(attempts=ended.attempts)
    return EXIT_DONE


def _report(agent: Agent, place: NodePlace, number: int, code: int) -> None:
    reports = [asdict(replace(report, record=None)) for report in agent.reports]
    value = {"host": place.name, "exit_code": code, "ranks": reports, "out_of_time": int(agent.out_of_time)}
    path = attempt_dir(agent.run_dir, number) / f"node-{place.node}.json"
    try:
        write_json(path, value)
    except OSError as error:
        # As of state.json: the exit code, and what the ranks printed, still say how it ended.
        print(f"{path} cannot be written: {error.strerror}", file=sys.stderr, flush=True)


class NodePeers:
    """`Peers` of the agent of one node among several: they meet in the visit's store. The head (node 0) alone writes state.json."""

    def __init__(self, visit: Visit, launcher: LauncherConfig) -> None:
        self.visit, self.place = visit, visit.place
        self.writes_state = visit.place.node == 0
        self.end_reason: str | None = None
        self.grace, self.metrics, self.looked = GraceWatch(launcher.grace_s), MetricsFollower(visit.run_dir), 0.0

    def ranks(self, ranks_per_node: int) -> range:
        """Ranks are numbered node by node."""
        return range(self.place.node * ranks_per_node, (self.place.node + 1) * ranks_per_node)

    def rendezvous(self, run_id: str, timeout_s: int) -> StaticTCPRendezvous:
        """Ranks meet in the store of the agents."""
        from ..agent.elastic import NodesRendezvous

        return NodesRendezvous(self.visit.store, run_id, self.place.node, self.place.num_nodes, timeout_s)

    def others(self) -> Others:
        """All other agents, by way of the store."""
        from ..agent.hang_store import StoreOthers

        return StoreOthers(self.visit.store, self.place.node, self.place.num_nodes)

    def look(self, ranks: RankAgent, kill_now: Callable[[], None]) -> None:
        """Has a rank failed, here or elsewhere? Ranks may wait for a lost one for ever, as NCCL's do."""
        self._look_ahead()
        self._show_presence(kill_now)
        if any(process.exitcode for process in ranks.processes.values()):
            self.visit.ends.report_failed()
        elif self.visit.ends.failed_elsewhere():
            self.end_reason = "ended: ranks of another node had failed"
            ranks.end_the_rest()

    def _look_ahead(self) -> None:
        """Say in the job's output, well before it matters, that a stop will not end in launcher.grace_s."""
        if self.place.node or time.monotonic() < self.looked + _LOOK_S:
            return
        self.looked = time.monotonic()
        note = self.grace.add(self.metrics.read()).news()
        if note:
            print(note, flush=True)

    def _show_presence(self, kill_now: Callable[[], None]) -> None:
        other = self.visit.presence.show() if self.visit.presence is not None else None
        if other is not None:
            print(f"efflaunch: {other.describe(time.time())}, has taken the run directory", file=sys.stderr, flush=True)
            kill_now()
