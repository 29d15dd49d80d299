"""Requests a run's checkpoints for the training loop, and reports each one as saved or failed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..checkpoint.engine import CheckpointEngine, SaveReport
from ..checkpoint.mirror import MirrorReport
from ..checkpoint.replica.replicas import ReplicaReport
from ..errors import CheckpointError


class Saves:
    """Tracks the saves of one run: `on_saved` is the engine's on_save, and `begin` comes before the first save."""

    def __init__(self) -> None:
        self._engine: CheckpointEngine | None = None
        self._report: Callable[..., None] = _nobody
        self._saved = self._requested = -1
        self._error = ""

    def begin(self, engine: CheckpointEngine, report: Callable[..., None], restored: int | None) -> None:
        """Take over the engine; `restored` is the step whose checkpoint on disk the run resumes from (None: none)."""
        self._engine, self._report = engine, report
        self._saved = self._requested = -1 if restored is None else restored

    def request(self, step: int, extra: Callable[[], dict[str, Any]], *, final: bool) -> bool:
        """Start writing the state after `step` updates; False where that was done already."""
        assert self._engine is not None
        if self._requested == step:
            return False
        self._requested = step
        self._engine.save(step, extra(), final=final)
        return True

    def ensure_saved(self, step: int, *, mirrored: bool) -> None:
        """Wait, then raise CheckpointError where the run would end with work that is on no disk, whatever checkpoint.on_error is."""
        assert self._engine is not None
        self._engine.wait(mirrored=mirrored)
        if self._saved != step:
            raise CheckpointError(
                f"checkpoint of step {step}, the last of this run",
                found=self._error,
                expected="it on disk before the run ends; earlier checkpoints are intact",
                hint="make room, then the same command again resumes from the newest checkpoint",
            )

    def on_saved(self, report: SaveReport) -> None:
        """Report how a save went."""
        if report.error is not None:
            self._error = report.error
            self._report("checkpoint_failed", step=report.step, error=report.error)
            return
        self._saved = report.step
        path = f"{report.path.parent.name}/{report.path.name}"
        facts = {"save_s": report.save_s, "stall_s": report.stall_s, "snapshot_s": report.snapshot_s, "mode": report.mode}
        self._report("checkpoint", step=report.step, path=path, num_bytes=report.num_bytes, **facts)

    def replicated(self, report: ReplicaReport) -> None:
        """Report how a replica went. It counts for nothing here: what is in memory is on no disk."""
        self._report("replica", step=report.step, error=report.error, replica_s=report.replica_s)

    def mirrored(self, report: MirrorReport) -> None:
        """Report how a copy in the second place went, which may be of an earlier step."""
        if report.error is None:
            self._report("mirrored", step=report.step, mirror_s=report.mirror_s)
        else:
            self._report("mirror_failed", step=report.step, error=report.error)


def _nobody(event: str, **fields: Any) -> None:
    raise AssertionError(f"{event} before the run began")
