"""Manages an engine's replicas: opens its rank's keeper, says where images go, learns which are whole everywhere.

Note: agreement. A keeper lets the older image of a rank go when the next one begins, all but the one that is known to be
whole on every rank. So a rank never begins an image while it is not known whether the one before, which it has voted for,
became whole: it leaves that one out. One it has not voted for is given up, and then never becomes whole.
"""

from __future__ import annotations

import contextlib
import logging
import queue
import threading
import time
from dataclasses import dataclass
from pathlib import Path

from ...units import format_bytes, format_seconds
from ...utils.helper_thread import HelperThread
from ..attempt import Attempt
from ..provenance import free_memory
from ..rank_coordination import Peers, Votes
from .keeper_process import KeeperProcess, look, meeting_folder, send
from .plan import ReplicaSet, StoredImage, keeper_bytes, keepers_of, solve_set
from .source import ReplicaSource
from .stream import Address

log = logging.getLogger(__name__)
_ANSWER_S = 60.0


@dataclass(frozen=True, slots=True)
class ReplicaReport:
    """How the replica of one save went; the same on every rank, unless rank 0 is gone."""

    step: int
    error: str | None
    """None: every rank's image is in the memory of its keepers. That is not durable: it is lost with those hosts."""
    replica_s: float
    """Seconds from save() until then, as this rank saw it."""


class Replicas:
    """The replicas of one engine. `off`: why there are none; `leftover`: what a life before left. Collective where it says so."""

    def __init__(self, peers: Peers, directory: Path, node: str, timeout_s: float) -> None:
        """Open this rank's keeper and look at what a life before left. Collective."""
        self.peers, self.node, self.timeout_s = peers, node, timeout_s
        self.off: str | None = None
        self.leftover: ReplicaSet | None = None
        self.passed_over: list[str] = []
        """Newer ones that are not whole."""
        self.replicated: int | None = None
        """The newest step that is whole in memory, as far as this rank knows."""
        self.reports: queue.SimpleQueue[ReplicaReport] = queue.SimpleQueue()
        self.keeper: KeeperProcess | None = None
        self._agreed = ""
        self._last: _Vote | None = None
        self._lock = threading.Lock()
        self._queue: queue.SimpleQueue[_Vote | None] = queue.SimpleQueue()
        self._thread: HelperThread | None = None
        self._votes: Votes | None = None
        self._num_open, self._settled = 0, threading.Condition()
        self._folder = Path()
        self._answered: list[str] = []
        """Results that every rank has read once it votes again."""
        self._open(directory)

    def _open(self, directory: Path) -> None:
        peers, self._host = self.peers, self.peers.own_address()
        seen: list[tuple[list[StoredImage], int]] = []

        def mine() -> None:
            self._folder = meeting_folder(directory, self.node)
            seen.append(look(self._folder, self.node, self._host))

        failure = peers.agreed(mine)
        # Everybody has looked before anybody claims.
        failure = failure or peers.agreed(self._open_keeper)
        if failure is not None:
            self._turn_off(failure)
            return
        assert self.keeper is not None
        keepers = peers.gather((self.node, self.keeper.address.to_json()))
        self.nodes = [node for node, _ in keepers]
        self._addresses = [Address.from_json(fields) for _, fields in keepers]
        images, self._stored_bytes = seen[0]
        # One rank of each node tells what its keepers hold.
        stored = [image for of_rank in peers.gather(images if self._is_first() else []) for image in of_rank]
        self.leftover, self.passed_over = solve_set(stored)
        if self.leftover is not None:
            self._agreed = self.leftover.attempt

    def _open_keeper(self) -> None:
        self.keeper = KeeperProcess(self._folder, self.node, self.peers.rank, self._host, self.peers.session)

    def _turn_off(self, why: str) -> None:
        self.off = why
        if self.keeper is not None:
            self.keeper.stop()
        self.keeper = None
        if self._folder != Path():
            with contextlib.suppress(OSError):
                # Others of this run may still be there.
                self._folder.rmdir()
        if self.peers.rank == 0:
            log.warning("checkpoints: no replicas in memory (checkpoint.replica): %s", why)

    def source(self) -> ReplicaSource | None:
        """The source to restore from; None: none."""
        return ReplicaSource(self.leftover, self.node, self.timeout_s) if self.leftover is not None else None

    def settle(self, attempt: str) -> None:
        """Settle on the attempt the run resumes from (empty: another source): all older images but its go. Collective."""
        if self.off is not None:
            return
        self._agreed = attempt
        failure = self.peers.agreed(lambda: self._keep(attempt))
        if failure is not None:
            self._turn_off(failure)

    def _keep(self, attempt: str) -> None:
        assert self.keeper is not None
        self.keeper.keep(attempt)
        for path in self._unclaimed():
            send(path, {"do": "keep", "attempt": attempt} if attempt else {"do": "stop"})

    def _unclaimed(self) -> list[Path]:
        """Paths of keepers of ranks that this life has elsewhere, or not at all; one rank of the node sees to them."""
        if not self._is_first():
            return []
        here = {f"keeper-{rank}" for rank, node in enumerate(self.nodes) if node == self.node}
        return [path for path in self._folder.glob("keeper-*") if path.name not in here]

    def _is_first(self) -> bool:
        """Whether this is the first of the ranks of this node."""
        return self.nodes.index(self.node) == self.peers.rank

    def check_room(self, state_bytes: int) -> None:
        """Turns replicas off on all ranks where a node has too little memory for them. Collective; before the first image."""
        if self.off is not None or self._thread is not None:
            return
        sizes = self.peers.gather(state_bytes)
        needed = keeper_bytes(self.node, self.nodes, sizes) - self._stored_bytes
        free = free_memory()

        def check() -> None:
            if needed > free:
                raise OSError(f"they need {format_bytes(needed)} more on {self.node}, {format_bytes(free)} are free there")

        failure = self.peers.agreed(check)
        if failure is not None:
            self._turn_off(failure)

    def start(self) -> None:
        """Start the thread, after the store of votes is open."""
        if self.off is None and self._thread is None:
            self._votes = self.peers.votes()
            self._thread = HelperThread(self._run, "replicas")
            self._thread.start()

    def begin(self, attempt: Attempt) -> None:
        """Begin a replica, on the thread that copies, before anything is sent: says where its image goes, or that none is made."""
        if self.off is not None or self._thread is None:
            return
        vote = _Vote(attempt)
        with self._lock:
            before, self._last = self._last, vote
            agreed = self._agreed
            if before is not None and not before.is_over:
                if before.is_cast:
                    attempt.settle_replica(f"that of step {before.attempt.step} is not known to be whole on every rank yet")
                else:
                    before.is_overtaken = True
        if not attempt.replica_settled.is_set():
            keepers = [self._addresses[rank].to_json() for rank in keepers_of(self.peers.rank, self.nodes)]
            attempt.replica = {"keepers": keepers, "node": self.node, "agreed": agreed, "timeout_s": self.timeout_s}
        with self._settled:
            self._num_open += 1
        self._queue.put(vote)

    def wait(self, timeout_s: float) -> bool:
        """Wait until every replica that was begun is whole or given up; False where that takes longer."""
        with self._settled:
            return self._settled.wait_for(lambda: self._num_open == 0, timeout_s)

    def close(self, *, stop: bool) -> None:
        """Close it; `stop`: the keeper ends too, for nobody will restart from it."""
        self._queue.put(None)
        if self._thread is not None:
            self._thread.join(1.0)
        if self.keeper is not None and stop:
            self.keeper.stop()
        elif self.keeper is not None:
            self.keeper.leave()
        self.keeper = None

    def abandon(self) -> None:
        """Close without waiting; the keeper stays: another engine may follow."""
        self._queue.put(None)

    def _run(self) -> None:
        while (vote := self._queue.get()) is not None:
            try:
                error = self._settle(vote)
                self._refresh()
            except RuntimeError as failure:
                # The store is gone, and with it rank 0: the run is over.
                error = str(failure)
            report = ReplicaReport(vote.attempt.step, error, time.monotonic() - vote.attempt.started)
            self._report(report)
            with self._lock:
                vote.is_over = True
            with self._settled:
                self._num_open -= 1
                self._settled.notify_all()

    def _settle(self, vote: _Vote) -> str | None:
        """Settle one vote; returns why the set is not whole, None: it is."""
        assert self._votes is not None
        attempt, rank = vote.attempt, self.peers.rank
        if not attempt.replica_settled.wait(self.timeout_s):
            attempt.settle_replica(f"not there after {format_seconds(self.timeout_s)}")
        with self._lock:
            error = attempt.replica_error
            if vote.is_overtaken and error is None:
                error = "not there when the next save began"
            vote.is_cast = error is None
        self._votes.post(_vote_key(attempt, rank), error)
        error = self._decide(attempt, error) if rank == 0 else self._result(attempt)
        if error is None:
            with self._lock:
                first = self.replicated is None
                self._agreed, self.replicated = attempt.name, attempt.step
            if first:
                for path in self._unclaimed():
                    send(path, {"do": "stop"})
        return error

    def _decide(self, attempt: Attempt, mine: str | None) -> str | None:
        assert self._votes is not None
        keys = {_vote_key(attempt, rank): rank for rank in range(1, self.peers.world_size)}
        errors_of_others = self._votes.collect(list(keys), self.timeout_s) if keys else {}
        errors = {0: mine} | {keys[key]: error for key, error in errors_of_others.items()}
        against = [f"{error} (rank {rank})" for rank, error in sorted(errors.items()) if error is not None]
        missing = [rank for rank in range(self.peers.world_size) if rank not in errors]
        if missing:
            against.append(f"rank {missing[0]} did not say within {format_seconds(self.timeout_s)}")
        error = against[0] if against else None
        self._votes.post(_result_key(attempt), error)
        # Whoever has voted has read the result before.
        self._votes.forget([*keys, *self._answered])
        self._answered = [_result_key(attempt)] if not missing else []
        return error

    def _result(self, attempt: Attempt) -> str | None:
        assert self._votes is not None
        answer = self._votes.collect([_result_key(attempt)], self.timeout_s + _ANSWER_S)
        return answer[_result_key(attempt)] if answer else "rank 0 did not say whether it is whole"

    def _refresh(self) -> None:
        """Replace a keeper that died, and give the others its address."""
        assert self._votes is not None and self.keeper is not None
        mine = f"keeper/{self.peers.rank}"
        if not self.keeper.is_alive:
            log.warning("checkpoints: the keeper process %d of replicas is gone; another one takes its place", self.keeper.pid)
            self.keeper.leave()
            self.keeper.reap()
            try:
                self._open_keeper()
            except OSError as error:
                log.warning("checkpoints: %s", error)
            self._addresses[self.peers.rank] = self.keeper.address
            self._votes.post(mine, self.keeper.address.to_json())
        keys = {f"keeper/{rank}": rank for rank in keepers_of(self.peers.rank, self.nodes) if rank != self.peers.rank}
        for key, fields in self._votes.there(list(keys)).items():
            self._addresses[keys[key]] = Address.from_json(fields)

    def _report(self, report: ReplicaReport) -> None:
        self.reports.put(report)
        if self.peers.rank != 0:
            return
        if report.error is None:
            text = "checkpoint of step %d: replicated in the memory of %s after %s; that alone is not durable"
            hosts = f"{len(set(self.nodes))} hosts" if len(set(self.nodes)) > 1 else "this host"
            log.info(text, report.step, hosts, format_seconds(report.replica_s))
        else:
            log.warning("checkpoint of step %d: no replica in memory: %s", report.step, report.error)


@dataclass(slots=True)
class _Vote:
    """The vote of this rank on one attempt's image."""

    attempt: Attempt
    is_cast: bool = False
    """Whether the vote was cast in favour."""
    is_overtaken: bool = False
    is_over: bool = False


def _vote_key(attempt: Attempt, rank: int) -> str:
    return f"replica/{attempt.name}/{rank}"


def _result_key(attempt: Attempt) -> str:
    return f"replica/{attempt.name}/result"
