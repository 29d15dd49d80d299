"""Copies committed checkpoints to a second place, behind everything else. Rank 0 says which; each rank puts its own files.

Where the second place is slower than saves come, the newest is taken and those between are left out.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from dataclasses import dataclass
from pathlib import Path

from ..units import format_seconds
from ..utils.helper_thread import HelperThread
from . import files
from .progress import RestoreProgress
from .rank_coordination import Peers
from .tier import Tier, own_files

log = logging.getLogger(__name__)
_POLL_S = 1.0


@dataclass(frozen=True, slots=True)
class MirrorReport:
    """How one copy went, as rank 0 knows."""

    step: int
    error: str | None
    """None: it counts there."""
    mirror_s: float


class Mirror:
    """One thread per rank. `mirrored` is the newest step that counts there, as rank 0 knows."""

    def __init__(self, peers: Peers, tier: Tier, keep_last: int, timeout_s: float) -> None:
        self.peers, self.tier, self.keep_last, self.timeout_s = peers, tier, keep_last, timeout_s
        self.mirrored: int | None = None
        self.error: str | None = None
        """Why the newest attempt failed; None: it did not."""
        self.reports: queue.SimpleQueue[MirrorReport] = queue.SimpleQueue()
        """Reports, on rank 0, of every attempt and every wait that was too short."""
        self._votes = peers.votes()
        self._waiting: list[Path] = []
        self._current: Path | None = None
        self._changed = threading.Condition()
        self._closing = False
        self._thread = HelperThread(self._run, "mirror")
        self._thread.start()

    def add(self, path: Path) -> None:
        """Queue, on rank 0, a checkpoint that was committed; returns at once."""
        with self._changed:
            self._waiting.append(path)
            self._changed.notify_all()

    def in_use(self) -> set[Path]:
        """Steps that retention must leave for now."""
        with self._changed:
            return {path for path in (self._current, *self._waiting[-1:]) if path is not None}

    def wait(self, timeout_s: float) -> bool:
        """Wait, on rank 0, until everything is there or has failed; False where that takes longer."""
        with self._changed:
            if self._changed.wait_for(lambda: not self._waiting and self._current is None, timeout_s):
                return True
            path = self._waiting[-1] if self._waiting else self._current
        assert path is not None, "waited for"
        self._report(MirrorReport(_step_of(path), f"not there within {format_seconds(timeout_s)}", timeout_s))
        return False

    def close(self) -> None:
        """Give up what is under way; the next start takes it up again."""
        self.abandon()
        self._thread.join(_POLL_S * 2)

    def abandon(self) -> None:
        """Close without waiting."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()

    def _run(self) -> None:
        try:
            self._mirror_all()
        except RuntimeError as failure:
            # The store is gone, and with it rank 0: the run is over.
            log.debug("mirroring ended", exc_info=failure)

    def _mirror_all(self) -> None:
        number = 0
        while not self._closing:
            path = self._next(number)
            if path is None:
                continue
            started = time.monotonic()
            self.error = self._copy(path, number)
            if self.peers.rank == 0:
                self._report(MirrorReport(_step_of(path), self.error, time.monotonic() - started))
            number += 1
            with self._changed:
                self._current = None
                self._changed.notify_all()

    def _next(self, number: int) -> Path | None:
        """Choose the newest waiting checkpoint on rank 0; others receive it."""
        if self.peers.rank != 0:
            posted = self._votes.collect([f"mirror/{number}"], _POLL_S)
            return Path(posted[f"mirror/{number}"]) if posted else None
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._closing)
            if not self._waiting:
                return None
            self._current = self._waiting[-1]
            self._waiting.clear()
        self._votes.post(f"mirror/{number}", str(self._current))
        return self._current

    def _copy(self, path: Path, number: int) -> str | None:
        """Copy a checkpoint; returns what went wrong on any rank (known to rank 0) or on this one."""
        step, rank = _step_of(path), self.peers.rank
        error = None
        try:
            self.tier.put(path, step, own_files(path, rank))
        except Exception as failure:  # whatever a store raises: it is reported, and training goes on
            error = f"{type(failure).__name__}: {failure}"
        self._votes.post(f"mirror/{number}/{rank}", error)
        if rank != 0:
            return error
        keys = [f"mirror/{number}/{other}" for other in range(1, self.peers.world_size)]
        votes = self._votes.collect(keys, self.timeout_s)
        self._votes.forget([*keys, f"mirror/{number - 1}"])
        error = error or next((vote for vote in votes.values() if vote is not None), None)
        if error is None and len(votes) < len(keys):
            error = f"not every rank was done within {format_seconds(self.timeout_s)}"
        return error or self._commit(path, step)

    def _commit(self, path: Path, step: int) -> str | None:
        try:
            self.tier.commit(path, step)
        except Exception as failure:  # as above
            return f"{type(failure).__name__}: {failure}"
        try:
            self.tier.prune(self.keep_last)
        except Exception as failure:  # as above; the new one counts all the same
            log.error("older checkpoints stay at %s: %s: %s", self.tier.address, type(failure).__name__, failure)
        return None

    def _report(self, report: MirrorReport) -> None:
        if report.error is None:
            self.mirrored = report.step
            text = "checkpoint of step %d: durable at %s too, after %s more"
            log.info(text, report.step, self.tier.address, format_seconds(report.mirror_s))
        else:
            log.error("checkpoint of step %d is not at %s: %s", report.step, self.tier.address, report.error)
        self.reports.put(report)


def _step_of(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def fetch(tier: Tier, step: int, directory: Path, peers: Peers, progress: RestoreProgress) -> str | None:
    """Fetch a checkpoint, each rank some of its files, every byte checked; returns what went wrong. Collective."""
    temporary = files.temporary_path(directory, step, "fetched")
    failure = peers.agreed(lambda: _start_fetch(temporary) if peers.rank == 0 else None)
    failure = failure or peers.agreed(lambda: _fetch_share(tier, step, temporary, peers, progress))
    return failure or peers.agreed(lambda: files.publish(temporary, step) if peers.rank == 0 else None)


def _start_fetch(temporary: Path) -> None:
    files.remove(temporary)
    temporary.mkdir()


def _fetch_share(tier: Tier, step: int, temporary: Path, peers: Peers, progress: RestoreProgress) -> None:
    progress.begin(f"fetching step {step} from {tier.address}", 0)
    record = tier.record(step)
    if peers.rank == 0:
        tier.fetch(step, temporary, files.COMMIT_FILE, None, progress)
    for rank in range(peers.rank, int(record["world_size"]), peers.world_size):
        manifest = tier.manifest(step, record, rank)
        for file in manifest.files:
            tier.fetch(step, temporary, file.name, manifest, progress)
        tier.fetch(step, temporary, f"rank-{rank}.json", None, progress)
