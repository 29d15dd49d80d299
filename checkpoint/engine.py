"""Saves and restores the full training state: save() returns at once. Every rank calls every method, in the same order.

Note: lazy snapshots. Parameters and optimizer states change in the update only, so their copies may run while the next
forward and backward do; wait_for_snapshot() stands before the update. What a forward may change (buffers, generators) and all
Python state is copied inside save(). What a save is called at each stage: `returned` (save() is back), `snapshotted` (host
memory holds it: training may change the state), `durable` (committed on disk: it counts), `mirrored` (committed there too).
"""

from __future__ import annotations

import json
import logging
import queue
import socket
import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import CheckpointError
from ..units import format_seconds
from . import files
from . import provenance as facts_of
from .archive import FileLayout, fingerprint, plan_files
from .attempt import Attempt
from .commit import CommitOutcome, Committer, Retention
from .components import Parts, device_of, not_mirrored, stopped, wait_until_seen
from .config import CheckpointConfig, OnBusy, OnSaveError, Replica
from .mirror import Mirror, MirrorReport
from .pacing import Pacing
from .rank_coordination import Peers
from .replica.replicas import ReplicaReport, Replicas
from .restore import Restored, Restorer
from .saver import Saver
from .sizes import SEGMENT_BYTES, snapshot_pool_bytes
from .state import State, rng_tensors, weights_of
from .tier import open_tier, reach

log = logging.getLogger(__name__)
CLOSE_S = 5.0
_WARM_UP_CALL = 2
"""At the second update the optimizer has its states: memory for snapshots is made ready before the first save needs it."""
__all__ = ["CheckpointEngine", "ReplicaReport", "Restored", "SaveReport"]


@dataclass(frozen=True, slots=True)
class SaveReport:
    """How one save went; given to `on_save` on every rank, at the first call of the engine after it is known."""

    step: int
    path: Path
    save_s: float
    """Seconds from save() until durable."""
    num_bytes: int
    """Bytes on disk, of all ranks; 0 where it failed."""
    error: str | None
    """None: the checkpoint is committed and on disk."""
    stall_s: float = 0.0
    """Seconds that training waited for it, in save() and wait_for_snapshot()."""
    snapshot_s: float = 0.0
    """Seconds from save() until host memory held it."""
    mode: str = ""
    """How this rank wrote: `direct`, or `buffered` where the file system refuses direct writes."""


class CheckpointEngine:
    """Writes `directory/step-N` in torch.distributed.checkpoint's format, for any sharding, readable by any world size.

    Memory: a pool of host memory (see sizes.snapshot_pool_bytes), from the second update on; restoring loads in place into
    the model and the optimizer (whose states are allocated if absent). Ranks meet over groups of the engine's own; without
    a process group this is a world of one. All ranks must see `directory`: CheckpointError at construction otherwise, or
    where it cannot be written.
    """

    def __init__(
        self,
        config: CheckpointConfig,
        directory: Path,
        *,
        state: State,
        metadata: dict[str, Any],
        on_save: Callable[[SaveReport], None] | None = None,
        on_replica: Callable[[ReplicaReport], None] | None = None,
        on_mirror: Callable[[MirrorReport], None] | None = None,
        segment_bytes: int = SEGMENT_BYTES,
        fault: str = "",
        node: str = "",
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Open it; `state`: what is saved, and restored in place. `metadata` is JSON: describes the run (hf_config, config, layout, seed,
        tokenizer). `on_save` hears of every save, `on_replica` of every replica, `on_mirror` (of rank 0) of every copy in the second place.

        `segment_bytes` (a multiple of 4096), `fault` (faults.Faults), `node` (instead of the host's name) and `clock` (by which
        storage's silence is timed) are for tests.
        """
        self.config, self.directory, self.metadata = config, Path(directory).absolute(), metadata
        self._state = state
        self._on_save, self._on_replica, self._on_mirror = on_save, on_replica, on_mirror
        self._peers = Peers(config.commit_timeout_s)
        self._segment_bytes, self._fault, self._clock = segment_bytes, fault, clock
        self._layout: FileLayout | None = None
        self._fingerprint = 0
        self._weights_hash, self._versions = "", facts_of.versions()
        self._saver: Saver | None = None
        self._committer: Committer | None = None
        self._mirror: Mirror | None = None
        self._pending: list[Attempt] = []
        self._latest: Attempt | None = None
        self._not_mirrored: MirrorReport | None = None
        """Failure of the second place, as `_failure`; on rank 0."""
        self._stops_for_mirror = False
        """Whether rank 0 has one: known to all alike."""
        self._failure: CommitOutcome | None = None
        """Not yet raised, where a failed save stops training."""
        self._maybe_pending = False
        """Whether any rank may still wait for an outcome: known to all alike."""
        self._pacing = Pacing(config)
        self._num_attempts = self._num_waits = 0
        self._node = node or socket.gethostname()
        self._replicas: Replicas | None = None
        self._parts = Parts()
        # An engine that is dropped without close() leaves no threads and no processes behind.
        weakref.finalize(self, self._parts.abandon).atexit = False
        self._open()

    def save(self, step: int, extra: dict[str, Any], *, final: bool = False) -> None:
        """Starts writing the state after `step` updates and returns; rank 0's `extra` (JSON) is kept.

        A later call of any method reports how it went. A save that fails on any rank leaves nothing half-written, older
        checkpoints are untouched, and `config.on_error` decides: `on_save` and the log hear of it, or every rank raises
        CheckpointError. `final`: never skipped, whatever `config.on_busy` says.
        """
        started = time.monotonic()
        tensors = self._tensors()
        current = fingerprint(tensors, self._state.sharding)
        replan = self._layout is None or current != self._fingerprint
        changed, busy, *times = self._agree(float(replan), float(bool(self._pending)), *self._pacing.measured)
        if (plan := self._pacing.saving(step, *times)) is not None:
            self._log(logging.INFO, "%s", plan)
        if busy and not final and not self._admit(step):
            return
        if changed:
            self._plan(tensors, current)
        assert self._saver is not None and self._committer is not None
        attempt = self._attempt(step, tensors, extra)
        self._pending.append(attempt)
        self._latest, self._maybe_pending = attempt, True
        self._saver.start(attempt)
        self._committer.add(attempt)
        if self._pacing.is_eager:
            attempt.enqueued.wait()
        attempt.stall_s += time.monotonic() - started
        if self._stops_for_mirror:
            # Training stops here, with this save on disk.
            self.wait()

    def due(self, step: int) -> bool:
        """Whether to save after `step` updates; the same answer on every rank."""
        return self._pacing.due(step)

    def wait_for_snapshot(self) -> None:
        """Returns when parameters and optimizer states may change; before every update. On CUDA the stream waits, not the host."""
        self._num_waits += 1
        if self._num_waits == _WARM_UP_CALL and self._layout is None and self.config.every_steps is not None:
            self._warm_up()
        attempt, self._latest = self._latest, None
        if attempt is not None:
            started = time.monotonic()
            attempt.enqueued.wait()
            if attempt.copy_event is not None:
                torch.cuda.current_stream().wait_event(attempt.copy_event)
            attempt.stall_s += time.monotonic() - started
        self._pacing.note_step(attempt, self._saver)
        if self.config.on_error is OnSaveError.STOP and self._maybe_pending:
            # All raise at the same update, or none.
            self._agree()
        else:
            self._deliver()

    def wait(self, *, mirrored: bool = False, replicated: bool = False) -> None:
        """Returns when every save so far is durable or has failed, and is reported. Collective.

        `mirrored`: and is in the second place too, or that took longer than config.commit_timeout_s (the log says so).
        `replicated`: and it is known which are whole in the memory of hosts.
        """
        while self._pending:
            self._deliver(block=True)
        if self._committer is not None:
            self._committer.wait_idle()
        if mirrored and self._mirror is not None:
            # Where that takes too long it says so as a failure.
            self._mirror.wait(self.config.commit_timeout_s)
        if replicated and self._replicas is not None:
            self._replicas.wait(self.config.commit_timeout_s)
        self._agree()
        if self._stops_for_mirror:
            report, self._not_mirrored = self._peers.share(self._not_mirrored), None
            raise not_mirrored(report, str(self.config.mirror))

    def close(self) -> None:
        """Ends threads and the flusher, each within CLOSE_S; saves that are not reported yet end by themselves."""
        if self._committer is not None:
            self._committer.close(CLOSE_S)
        if self._saver is not None:
            self._saver.close(CLOSE_S)
        if self._mirror is not None:
            self._mirror.close()
        if self._replicas is not None:
            self._replicas.close(stop=True)
        self._saver = self._committer = self._mirror = self._replicas = None
        self._parts.clear()
        self._peers.close()

    @property
    def replicated(self) -> int | None:
        """The newest step that is whole in the memory of hosts, as far as this rank knows. It is lost with them: not durable."""
        return self._replicas.replicated if self._replicas is not None else None

    @property
    def flusher_pid(self) -> int | None:
        """The process that writes this rank's files; None before the first save."""
        flusher = self._saver.flusher if self._saver is not None else None
        return flusher.pid if flusher is not None else None

    @property
    def keeper_pid(self) -> int | None:
        """The process that keeps images of ranks in memory; None without replicas."""
        keeper = self._replicas.keeper if self._replicas is not None else None
        return keeper.pid if keeper is not None else None

    def restore(self, on_progress: Callable[[], None] = lambda: None) -> Restored | None:
        """Loads the newest whole checkpoint into model and optimizer; None where there is none.

        `on_progress` is called for whatever is read: a large one takes long.
        Every byte is checked against its hash while it is read. Damaged newer ones are passed over, logged and named in the
        result. CheckpointError where every one is damaged, or where the weights differ from the model's.
        """
        tier = open_tier(self.config.mirror) if self.config.mirror is not None else None
        where = (self.directory, self._peers, self._state, self.metadata)
        restored = Restorer(
            *where, tier, self._replicas, lambda: self._settle_leftovers(self.config.commit_timeout_s), on_progress
        ).restore()
        if self._replicas is not None and self._replicas.leftover is not None:
            self._replicas.settle(restored.attempt if restored is not None and restored.attempt == self._replicas.leftover.attempt else "")
            # What was left alone for the replica's sake.
            failure = self._agreed(lambda: self._settle_leftovers(0.0) if self._peers.rank == 0 else None)
            if failure is not None:
                self._log(logging.ERROR, "leftovers of an earlier start stay in %s: %s", self.directory, failure)
        return restored

    def _tensors(self) -> dict[str, Tensor]:
        """The live tensors; generators as they are now."""
        return self._state.tensors() | rng_tensors(self._peers.rank)

    def _attempt(self, step: int, tensors: dict[str, Tensor], extra: dict[str, Any]) -> Attempt:
        assert self._layout is not None
        self._num_attempts += 1
        name = f"{self._peers.session}-{self._num_attempts}"
        at_once, local = self._state.changing_in_forward(), self._state.local
        sources = [local(tensors[piece.key], piece.offsets) for piece in self._layout.pieces]
        sources = [
            source.clone() if piece.key in at_once else source for piece, source in zip(self._layout.pieces, sources, strict=True)
        ]
        facts = {"step": step, "attempt": name, "rank": self._peers.rank, "world_size": self._peers.world_size}
        folder = files.temporary_path(self.directory, step, name)
        attempt = Attempt(name, step, folder, self._layout, sources, {**facts, "chunk_bytes": self._layout.chunk_bytes})
        if self._peers.rank == 0:
            contents = {"step": step, "world_size": self._peers.world_size, "extra": extra, "metadata": self.metadata}
            contents |= {"model": self._weights_hash, "versions": self._versions}
            text = json.dumps(contents, indent=1, allow_nan=False).encode()
            attempt.texts = [*self._layout.extra_files, (files.STATE_FILE, text)]
        if torch.cuda.is_initialized():
            attempt.after = torch.cuda.Event()
            attempt.after.record()
        return attempt

    def _admit(self, step: int) -> bool:
        """Whether to save while another save is on its way (every rank comes to the same answer)."""
        if self.config.on_busy is OnBusy.SKIP:
            self._log(logging.INFO, "no checkpoint of step %d: the one before is still being written (checkpoint.on_busy=skip)", step)
            return False
        if self.config.on_busy is OnBusy.SUPERSEDE and self._saver is not None:
            for attempt in self._pending:
                self._saver.cancel(attempt)
        return True

    def _warm_up(self) -> None:
        tensors = self._tensors()
        self._plan(tensors, fingerprint(tensors, self._state.sharding))

    def _plan(self, tensors: dict[str, Tensor], current: int) -> None:
        """Set up layout, pool and threads for a state of this shape; collective."""
        while self._pending:
            self._deliver(block=True)
        peers = self._peers
        self._layout = plan_files(
            tensors, rank=peers.rank, largest_chunk=self._segment_bytes, gather=peers.gather_first, scatter=peers.scatter
        )
        self._fingerprint, self._weights_hash = current, facts_of.weights_hash(weights_of(tensors))
        if self._saver is not None:
            self._saver.close(CLOSE_S)
        segment = self._layout.chunk_bytes
        hosts = peers.gather(socket.gethostname())
        free = facts_of.free_memory() // hosts.count(socket.gethostname())
        size = snapshot_pool_bytes(self._layout.num_bytes, self.config.pool_bytes, free_bytes=free, segment=segment)
        begin = self._replicas.begin if self._replicas is not None else lambda attempt: None
        self._saver = self._parts.saver = Saver(size, segment, device_of(tensors), self._fault, begin)
        if self._committer is None:
            peers.open_store()
            if self.config.mirror is not None:
                self._mirror = self._parts.mirror = Mirror(
                    peers, open_tier(self.config.mirror), self.config.mirror_keep_last, self.config.commit_timeout_s
                )
            if self._replicas is not None:
                self._replicas.check_room(self._layout.num_bytes)
                self._replicas.start()
            retention = Retention(self.config.keep_last, self.config.keep_every, self.config.delete_bytes_per_s)
            self._committer = self._parts.committer = Committer(
                peers,
                self.config.commit_timeout_s,
                retention,
                last_message_s=self._parts.last_message_s,
                on_hang=self._parts.end_flusher,
                committed=self._mirror.add if self._mirror is not None and peers.rank == 0 else lambda path: None,
                in_use=self._mirror.in_use if self._mirror is not None else set,
                fault=self._fault,
                clock=self._clock,
            )

    def _agree(self, *flags: float) -> list[float]:
        """Meets all ranks: the largest of each flag; raises on all where a failed save stops training."""
        self._deliver()
        mine = [float(self._failure is not None), float(self._not_mirrored is not None), float(bool(self._pending)), *flags]
        failed, not_there, pending, *largest = self._peers.largest(mine)
        self._maybe_pending = pending > 0
        self._stops_for_mirror = not_there > 0
        if failed and self.config.on_error is OnSaveError.STOP:
            while self._failure is None and self._pending:
                self._deliver(block=True)
            outcome, self._failure = self._failure, None
            raise stopped(outcome, self.directory)
        self._failure = None
        return largest

    def _deliver(self, *, block: bool = False) -> None:
        """Report what has been settled since the last call."""
        while self._replicas is not None and not self._replicas.reports.empty():
            report = self._replicas.reports.get()
            if self._on_replica is not None:
                self._on_replica(report)
        while self._mirror is not None and not self._mirror.reports.empty():
            self._deliver_mirrored(self._mirror.reports.get())
        while self._pending and self._committer is not None:
            try:
                outcome = self._committer.outcomes.get(block=block)
            except queue.Empty:
                return
            block = False
            self._pending.remove(outcome.attempt)
            self._report(outcome)

    def _deliver_mirrored(self, report: MirrorReport) -> None:
        if report.error is not None and self.config.mirror_on_error is OnSaveError.STOP:
            self._not_mirrored = self._not_mirrored or report
        if self._on_mirror is not None:
            self._on_mirror(report)

    def _report(self, outcome: CommitOutcome) -> None:
        attempt = outcome.attempt
        if outcome.superseded:
            self._log(logging.INFO, "no checkpoint of step %d: superseded by a newer save", attempt.step)
            return
        flushed = attempt.flushed
        report = SaveReport(
            step=attempt.step,
            path=files.step_path(self.directory, attempt.step),
            save_s=outcome.durable_s,
            num_bytes=outcome.num_bytes,
            error=outcome.error,
            stall_s=attempt.stall_s,
            snapshot_s=attempt.snapshot_s,
            mode=flushed.mode if flushed is not None else "",
        )
        self._pacing.costs = (report.stall_s, report.save_s)
        if outcome.error is not None:
            self._failure = outcome
            self._log(logging.ERROR, "checkpoint of step %d failed: %s", attempt.step, outcome.error)
        else:
            text = "checkpoint of step %d: durable after %s (%s), training waited %s"
            self._log(logging.INFO, text, attempt.step, format_seconds(report.save_s), report.mode, format_seconds(report.stall_s))
        if self._on_save is not None:
            self._on_save(report)

    def _open(self) -> None:
        first = self._peers.rank == 0
        failure = self._agreed(lambda: files.check_writable(self.directory) if first else None)
        failure = failure or self._agreed(lambda: wait_until_seen(self.directory))
        if failure is None and self.config.replica is Replica.PEER:
            self._replicas = self._parts.replicas = Replicas(self._peers, self.directory, self._node, self.config.commit_timeout_s)
        # Where memory has a whole one, nobody waits for writers that are still at work.
        wait_s = self.config.commit_timeout_s if self._replicas is None or self._replicas.leftover is None else None
        failure = failure or self._agreed(lambda: self._settle_leftovers(wait_s) if first else None)
        if failure is not None:
            raise CheckpointError(
                str(self.directory), found=failure, expected="a directory all ranks can write", hint="run.root=DIRECTORY on shared storage"
            )
        if self.config.mirror is not None:
            # A place nobody can write to is a mistake of now, not of the first save.
            self._reach_mirror(self.config.mirror)

    def _reach_mirror(self, address: str) -> None:
        """Raise CheckpointError on every rank where one of them cannot write there; each puts its own files."""
        error: CheckpointError | None = None
        try:
            reach(address, self.directory)
        except CheckpointError as failure:
            error = failure
        error = next((one for one in self._peers.gather(error) if one is not None), None)
        if error is not None:
            raise error

    def _settle_leftovers(self, wait_s: float | None) -> None:
        """Settle leftovers; `wait_s` None: without waiting, and what is still being written is left alone."""
        for step in files.settle_leftovers(self.directory, wait_s or 0.0, leave_busy=wait_s is None):
            log.warning("checkpoint of step %d: every rank had written it when training stopped; committed now", step)

    def _agreed(self, action: Callable[[], object]) -> str | None:
        return self._peers.agreed(action)

    def _log(self, level: int, text: str, *args: object) -> None:
        if self._peers.rank == 0:
            log.log(level, text, *args)
