"""Restores the newest checkpoint that proves whole into a model and an optimizer. Collective."""

from __future__ import annotations

import json
import logging
import shlex
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import CheckpointError
from . import files, state
from .archive import METADATA_FILE
from .mirror import fetch
from .progress import RestoreProgress
from .rank_coordination import Peers
from .reader import Reader, SavedTensor
from .replica.replicas import Replicas
from .source import Source
from .tier import Tier

log = logging.getLogger(__name__)
_Candidate = tuple[int, files.CheckpointInfo | None, bool]
"""Step, what is here, and whether it is in the second place."""


@dataclass(frozen=True, slots=True)
class Restored:
    """What restore found, apart from the tensors it loaded."""

    step: int
    path: Path
    extra: dict[str, Any]
    """Extra state as given to save, by rank 0."""
    metadata: dict[str, Any]
    """Metadata as given to the engine that saved."""
    same_layout: bool
    """False: saved by another number of ranks; random generators were re-seeded from (seed, step, rank)."""
    skipped: tuple[str, ...]
    """Newer checkpoints that are damaged, one line each."""
    is_durable: bool = True
    """False: it came from the memory of hosts, and no disk has it."""
    attempt: str = ""
    """Attempt of the save it is from."""
    origin: str = ""
    """Source it was read from."""


class Restorer:
    """One restore. Candidates are tried newest first; the first that every rank reads without damage is the one."""

    def __init__(
        self,
        directory: Path,
        peers: Peers,
        own: state.State,
        metadata: dict[str, Any],
        tier: Tier | None = None,
        replicas: Replicas | None = None,
        settle: Callable[[], None] = lambda: None,
        on_progress: Callable[[], None] = lambda: None,
    ) -> None:
        """Open it; `own`: what is filled.

        `tier`: a second place, asked for what is not whole here. `replicas`: memory of hosts, asked first; where it has
        nothing after all, rank 0 calls `settle`, which waits for writers of a life before. `on_progress` is called for whatever is read.
        """
        self._tier, self._replicas, self._settle = tier, replicas, settle
        self.directory, self.peers, self.metadata = directory, peers, metadata
        self._progress = RestoreProgress(on_progress, logs=peers.rank == 0)
        self._state = own
        self._skipped: list[str] = []
        self._failed_replicas: list[str] = []

    def restore(self) -> Restored | None:
        """Restore; None where there is no checkpoint; CheckpointError on every rank where none is whole or it is another model's."""
        candidates = self._candidates()
        restored = self._from_memory(candidates)
        if restored is not None:
            return restored
        if self._replicas is not None and self._replicas.leftover is not None:
            failure = self.peers.agreed(lambda: self._settle() if self.peers.rank == 0 else None)
            if failure is not None:
                self._log("leftovers of an earlier start: %s", failure)
            candidates = self._candidates()
        for step, here, there in candidates:
            restored = self._from_here(here) if here is not None else None
            if restored is None and there:
                restored = self._from_there(step)
            if restored is not None:
                return restored
        if self._skipped:
            raise self._nothing_whole()
        return None

    def _from_memory(self, candidates: list[_Candidate]) -> Restored | None:
        """Restore what a life of the run before left in memory, unless storage has a newer one. The log says why it is not taken."""
        if self._replicas is None or self._replicas.off is not None:
            return None
        for line in self._replicas.passed_over:
            self._log("replica in memory passed over: %s", line)
        source = self._replicas.source()
        if source is None:
            return None
        step = int(source.commit["step"])
        stored = [other for other, here, there in candidates if there or (here is not None and here.is_whole)]
        if any(other > step for other in stored):
            self._log("replica in memory passed over: %s is older than step %d on disk", source.name, max(stored))
            return None
        durable = any(here is not None and here.is_whole and _is_of(here.path, source.commit) for at, here, _ in candidates if at == step)
        restored, failure = self._try(source)
        if restored is None:
            self._log("replica in memory passed over: %s: %s", source.name, failure)
            self._failed_replicas.append(f"{source.name}: {failure}")
            return None
        self._log("restored from %s%s", source.name, "" if durable else ", which is not on disk yet")
        return replace(restored, is_durable=durable)

    def _log(self, text: str, *values: object) -> None:
        if self.peers.rank == 0:
            log.warning(text, *values)

    def _from_here(self, info: files.CheckpointInfo) -> Restored | None:
        if info.problem is not None:
            self._skip(f"{info.path}: {info.problem}")
            return None
        restored, failure = self._try(info.path)
        if restored is None:
            self._skip(f"{info.path}: {failure}")
            self._mark(info.path, str(failure))
        return restored

    def _from_there(self, step: int) -> Restored | None:
        """Restore from the second place: fetched into the directory first, then as any other."""
        assert self._tier is not None
        failure = fetch(self._tier, step, self.directory, self.peers, self._progress)
        path = files.step_path(self.directory, step)
        if failure is None:
            if self.peers.rank == 0:
                log.warning("checkpoint of step %d fetched from %s", step, self._tier.address)
            restored, failure = self._try(path)
            if restored is not None:
                return restored
        self._skip(f"step {step} at {self._tier.address}: {failure}")
        return None

    def _candidates(self) -> list[_Candidate]:
        """The candidates, newest first: what rank 0 sees, on every rank."""
        candidates: list[list[_Candidate]] = []
        failure = self.peers.agreed(lambda: candidates.append(self._look()) if self.peers.rank == 0 else None)
        if failure is not None:
            where = str(self.directory) if self._tier is None else f"{self.directory}, {self._tier.address}"
            raise CheckpointError(where, found=f"what cannot be read ({failure})", expected="checkpoints", hint="ls -l there")
        return self.peers.share(candidates[0] if candidates else None)

    def _look(self) -> list[_Candidate]:
        here = {info.step: info for info in files.scan(self.directory)}
        there = set(self._tier.steps()) if self._tier is not None else set()
        return [(step, here.get(step), step in there) for step in sorted(here.keys() | there, reverse=True)]

    def _try(self, place: Path | Source) -> tuple[Restored | None, str | None]:
        opened: list[tuple[Reader, dict[str, Any]]] = []
        failure = self.peers.agreed(lambda: opened.append(self._open(place)))
        if failure is not None:
            return None, failure
        reader, contents = opened[0]
        model = state.weights_of(self._state.tensors())
        self._check_model(reader.source.name, self._differences(model, reader.tensors))
        self._state.allocate(reader.tensors)
        rng = _rng_targets(reader.tensors, self.peers.rank)
        tensors = self._state.tensors() | rng
        failure = self.peers.agreed(lambda: reader.read(tensors, self._state.pieces))
        if failure is not None:
            return None, failure
        return self._finish(reader, contents, rng), None

    def _differences(self, model: dict[str, Tensor], saved: dict[str, SavedTensor]) -> list[str]:
        """Differences to the model, those of the first rank with any, on all ranks. Weights may be on some ranks only (pipelines)."""
        missing = any(key.startswith(state.MODEL) and key not in model for key in saved)
        elsewhere: set[str] = set()
        if any(self.peers.largest([float(missing)])):
            elsewhere = {key for keys in self.peers.gather(list(model)) for key in keys}
        lines = state.differences(model, {key: entry for key, entry in saved.items() if key in model or key not in elsewhere})
        if not any(self.peers.largest([float(bool(lines))])):
            return []
        return next(differing for differing in self.peers.gather(lines) if differing)

    def _open(self, place: Path | Source) -> tuple[Reader, dict[str, Any]]:
        reader = Reader(place, progress=self._progress)
        if self.peers.rank == 0 and isinstance(place, Path):
            # We go by its JSON twin; whoever reads with plain torch must hear of damage too.
            reader.small(METADATA_FILE)
        return reader, json.loads(reader.small(files.STATE_FILE))

    def _finish(self, reader: Reader, contents: dict[str, Any], rng: dict[str, Tensor]) -> Restored:
        step, world_size = contents["step"], contents["world_size"]
        if same_layout := world_size == self.peers.world_size:
            state.set_rng(rng, self.peers.rank)
        else:
            state.seed_rng(int(self.metadata.get("seed", 0)), step, self.peers.rank)
        return Restored(
            step,
            files.step_path(self.directory, step),
            contents["extra"],
            contents["metadata"],
            same_layout,
            (*self._failed_replicas, *self._skipped),
            attempt=str(reader.source.commit["attempt"]),
            origin=reader.source.name,
        )

    def _skip(self, line: str) -> None:
        self._skipped.append(line)
        if self.peers.rank == 0:
            log.warning("checkpoint skipped: %s", line)

    def _mark(self, path: Path, failure: str) -> None:
        """Mark a damaged one, so that retention does not count it: older ones would be removed for its sake."""
        if self.peers.rank != 0:
            return
        try:
            files.mark_damaged(path, failure)
        except OSError as error:
            log.warning("%s cannot be marked as damaged: %s", path, error)

    def _check_model(self, name: str, differing: list[str]) -> None:
        if differing:
            more = f"\n    and {len(differing) - 5} more" if len(differing) > 5 else ""
            raise CheckpointError(
                name,
                found="another model's weights:\n    " + "\n    ".join(differing[:5]) + more + "\n  ",
                expected="the weights of the configured model",
                hint="run.id=ANOTHER_NAME for a new run, or the model this run was started with",
            )

    def _nothing_whole(self) -> CheckpointError:
        return CheckpointError(
            str(self.directory),
            found="only damaged checkpoints:\n    " + "\n    ".join(self._skipped) + "\n  ",
            expected="at least one whole checkpoint",
            hint=f"bring the files back (and remove DAMAGED there), or rm -r {shlex.quote(str(self.directory))} to start again from step 0",
        )


def _rng_targets(saved: dict[str, SavedTensor], rank: int) -> dict[str, Tensor]:
    prefix = f"{state.RNG}{rank}."
    return {key: torch.empty(entry.size, dtype=torch.uint8) for key, entry in saved.items() if key.startswith(prefix)}


def _is_of(path: Path, commit: dict[str, Any]) -> bool:
    return bool(files.read_commit(path)["attempt"] == commit["attempt"])
