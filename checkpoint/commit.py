"""Runs the second half of a save in a background thread: votes, one decision, retention. Never a training collective.

Phase one: this rank's flusher has its files and manifest on disk, and the rank posts its vote. Phase two: rank 0 collects
all votes within the time limit, commits (files.commit) or gives the attempt up, and posts the outcome.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ..units import format_seconds
from ..utils.helper_thread import HelperThread
from . import files
from .attempt import Attempt, Flushed
from .catalog import Catalog
from .deletion import Trash
from .faults import Faults
from .rank_coordination import Peers

log = logging.getLogger(__name__)
_ANSWER_S = 60.0
"""Rank 0 needs a little longer than its limit to say that the limit is over."""
_LOOK_S = 0.5
"""Between two looks at how long storage has been silent."""


@dataclass(frozen=True, slots=True)
class CommitOutcome:
    """Outcome of one attempt; the same on every rank, unless rank 0 is gone."""

    attempt: Attempt
    error: str | None
    num_bytes: int
    """Bytes of the whole checkpoint."""
    durable_s: float
    """Seconds from save() to the commit, as this rank saw it."""
    superseded: bool = False


@dataclass(frozen=True, slots=True)
class Retention:
    """Decides what is left after a commit."""

    keep_last: int
    keep_every: int | None = None
    delete_bytes_per_s: int | None = None


class Committer:
    """Takes attempts in order; puts an Outcome for each into `outcomes`."""

    def __init__(
        self,
        peers: Peers,
        timeout_s: float,
        retention: Retention,
        *,
        last_message_s: Callable[[], float],
        on_hang: Callable[[], None],
        committed: Callable[[Path], None],
        in_use: Callable[[], set[Path]],
        fault: str = "",
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Open it; `last_message_s`: when this rank's flusher last sent something; `on_hang`: ends it;

        `committed` is called at every commit;
        `in_use`: checkpoints that retention must leave for now;
        `clock`: by which silence is timed, never behind time.monotonic.
        """
        self.peers, self.timeout_s, self.retention = peers, timeout_s, retention
        self._votes_of_all = peers.votes()
        self.outcomes: queue.SimpleQueue[CommitOutcome] = queue.SimpleQueue()
        self._last_message_s, self._on_hang, self._committed, self._in_use = last_message_s, on_hang, committed, in_use
        self._catalog: Catalog | None = None
        self._faults, self._clock = Faults(fault), clock
        self._trash = Trash(retention.delete_bytes_per_s, self._faults.at)
        self._queue: queue.SimpleQueue[Attempt | None] = queue.SimpleQueue()
        self._answered: list[str] = []
        """Results that every rank has read once it votes again."""
        self._num_open = 0
        self._closed_one = threading.Condition()
        self._thread = HelperThread(self._run, "committer")
        self._thread.start()

    def add(self, attempt: Attempt) -> None:
        with self._closed_one:
            self._num_open += 1
        self._queue.put(attempt)

    def wait_idle(self) -> None:
        """Wait until retention is done too."""
        with self._closed_one:
            self._closed_one.wait_for(lambda: not self._num_open)
        self._trash.wait_idle()

    def close(self, timeout_s: float) -> None:
        self.abandon()
        self._thread.join(timeout_s)

    def abandon(self) -> None:
        """Close without waiting."""
        self._queue.put(None)
        self._trash.close()

    def _run(self) -> None:
        while (attempt := self._queue.get()) is not None:
            try:
                error, num_bytes = self._settle(attempt)
            except Exception as failure:  # this thread must live: whatever it is, the attempt fails with it
                log.debug("commit of step %d", attempt.step, exc_info=True)
                error, num_bytes = f"{type(failure).__name__}: {failure}", 0
            durable_s = time.monotonic() - attempt.started
            self.outcomes.put(CommitOutcome(attempt, error, num_bytes, durable_s, superseded=attempt.cancelled and error is not None))
            if error is None:
                self._after(attempt)
            with self._closed_one:
                self._num_open -= 1
                self._closed_one.notify_all()

    def _settle(self, attempt: Attempt) -> tuple[str | None, int]:
        mine = self._wait_flushed(attempt)
        self._faults.at("before_vote")
        ok, rank = mine.error is None, self.peers.rank
        self._votes_of_all.post(_vote(attempt, rank), {"error": mine.error, "hash": mine.manifest_hash})
        self._faults.at("after_vote")
        if rank == 0:
            return self._decide(attempt, mine)
        answer = self._votes_of_all.collect([_result(attempt)], self.timeout_s + _ANSWER_S)
        if not answer:
            return f"rank 0 did not say within {format_seconds(self.timeout_s)} whether it was committed" if ok else mine.error, 0
        error, num_bytes = answer[_result(attempt)]
        return error, num_bytes

    def _wait_flushed(self, attempt: Attempt) -> Flushed:
        """Wait for this rank's own part; storage that is silent for too long has failed."""
        started = self._clock()
        while not attempt.settled.wait(_LOOK_S):
            silent = self._clock() - max(self._last_message_s(), started)
            if silent > self.timeout_s:
                attempt.settle(Flushed(f"storage did not answer for {format_seconds(silent)}"))
                self._on_hang()
        assert attempt.flushed is not None
        return attempt.flushed

    def _decide(self, attempt: Attempt, mine: Flushed) -> tuple[str | None, int]:
        """Decide on rank 0 what becomes of the attempt, for all ranks."""
        votes, error = self._votes(attempt, mine)
        num_bytes = 0
        if error is None:
            try:
                num_bytes = files.commit(attempt.folder, votes=votes, at=self._faults.at)
            except (OSError, ValueError) as failure:
                error = f"{failure} (rank 0)" if self.peers.world_size > 1 else str(failure)
        if error is not None:
            error = self._discard(attempt, error)
        self._votes_of_all.post(_result(attempt), [error, num_bytes])
        self._votes_of_all.forget([*self._answered, *(_vote(attempt, rank) for rank in range(self.peers.world_size))])
        self._answered = [_result(attempt)]
        return error, num_bytes

    def _votes(self, attempt: Attempt, mine: Flushed) -> tuple[dict[int, str], str | None]:
        """The manifest hash of each rank, or the first reason against."""
        keys = {_vote(attempt, rank): rank for rank in range(1, self.peers.world_size)}
        replies = self._votes_of_all.collect(list(keys), self.timeout_s) if keys else {}
        votes = {0: mine.manifest_hash} | {keys[key]: vote["hash"] for key, vote in replies.items()}
        against = {0: mine.error} | {keys[key]: vote["error"] for key, vote in replies.items()}
        for rank in sorted(against):
            if against[rank] is not None:
                return votes, f"{against[rank]} (rank {rank})" if self.peers.world_size > 1 else against[rank]
        missing = [rank for rank in range(self.peers.world_size) if rank not in votes]
        if missing:
            which = ", ".join(map(str, missing))
            return votes, f"no vote of rank {which} within {format_seconds(self.timeout_s)}"
        return votes, None

    def _discard(self, attempt: Attempt, error: str) -> str:
        """Move the attempt out of the way, so that no later start takes it for finished."""
        try:
            files.remove(attempt.folder)
        except OSError as failure:
            return f"{error}; {attempt.folder} stays behind: {failure}"
        return error

    def _after(self, attempt: Attempt) -> None:
        final = files.step_path(attempt.folder.parent, attempt.step)
        self._committed(final)
        if self.peers.rank == 0:
            keep = self.retention
            try:
                self._faults.at("before_prune")
                if self._catalog is None:
                    self._catalog = Catalog(final.parent)
                self._catalog.prune(attempt.step, keep.keep_last, keep.keep_every, in_use=self._in_use(), discard=self._trash.put)
            except OSError as failure:
                log.error("older checkpoints stay in %s: %s", final.parent, failure)


def _vote(attempt: Attempt, rank: int) -> str:
    return f"{attempt.name}/vote/{rank}"


def _result(attempt: Attempt) -> str:
    return f"{attempt.name}/result"
