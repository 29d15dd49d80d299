"""Saves and restores the full training state; synchronous. Every rank calls every method, in the same order."""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..errors import CheckpointError
from ..units import format_bytes
from . import files, state, storage
from .config import CheckpointConfig, OnSaveError

log = logging.getLogger(__name__)
T = TypeVar("T")
SEEN_S = 10.0
"""Network file systems show a new directory to other nodes some seconds late."""


@dataclass(frozen=True, slots=True)
class SaveReport:
    """How one save went; given to `on_save` on every rank."""

    step: int
    path: Path
    save_s: float
    num_bytes: int
    """On disk; known to rank 0 only, 0 elsewhere."""
    error: str | None
    """None: the checkpoint is committed and on disk."""


@dataclass(frozen=True, slots=True)
class Restored:
    """What restore found, apart from the tensors it loaded."""

    step: int
    path: Path
    extra: dict[str, Any]
    """As given to save, by rank 0."""
    metadata: dict[str, Any]
    """As given to the engine that saved."""
    same_layout: bool
    """False: saved by another number of ranks; random generators were re-seeded from (seed, step, rank)."""
    skipped: tuple[str, ...]
    """Newer checkpoints that are damaged, one line each."""


class CheckpointEngine:
    """Writes `directory/step-N` in torch.distributed.checkpoint's format, for any sharding, readable by any world size.

    Memory: saving copies one tensor at a time from the device; restoring loads in place into the model and the
    optimizer (whose states are allocated if absent). Ranks meet through the default process group; without one this
    is a world of one. All ranks must see `directory`: CheckpointError at construction otherwise, or where it cannot
    be written.
    """

    def __init__(
        self,
        config: CheckpointConfig,
        directory: Path,
        *,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        metadata: dict[str, Any],
        on_save: Callable[[SaveReport], None] | None = None,
    ) -> None:
        """`metadata` is JSON: describes the run (hf_config, config_hash, layout, seed, tokenizer). `on_save` hears of every save."""
        self.config, self.directory, self.metadata = config, Path(directory), metadata
        self._model, self._optimizer, self._on_save = model, optimizer, on_save
        self._rank = dist.get_rank() if dist.is_initialized() else 0
        self._world_size = dist.get_world_size() if dist.is_initialized() else 1
        self._open()

    def save(self, step: int, extra: dict[str, Any]) -> None:
        """Writes the state after `step` updates and returns when it is durable; rank 0's `extra` (JSON) is kept.

        When it fails on any rank, all ranks agree, nothing half-written stays, older checkpoints are untouched, and
        `config.on_error` decides: `on_save` and the log hear of it, or every rank raises CheckpointError.
        """
        started = time.monotonic()
        try:
            num_bytes, error = self._write(step, extra), None
        except _SaveError as failure:
            num_bytes, error = 0, str(failure)
            self._discard(step)
        report = SaveReport(step, files.step_path(self.directory, step), time.monotonic() - started, num_bytes, error)
        if self._on_save is not None:
            self._on_save(report)
        if error is not None:
            self._failed(step, error)

    def wait_for_snapshot(self) -> None:
        """Returns when parameters and optimizer states may change: at once, since save has copied everything already."""

    def restore(self) -> Restored | None:
        """Loads the newest whole checkpoint into model and optimizer; None where there is none.

        Damaged newer ones are passed over, logged and named in the result. CheckpointError where every one is damaged,
        where the contents cannot be read, or where the weights differ from the model's.
        """
        path, skipped = self._agreed_choice()
        for line in skipped:
            self._log(logging.WARNING, "checkpoint skipped: %s", line)
        if path is None:
            if skipped:
                raise self._nothing_whole(skipped)
            return None
        return self._load(path, skipped)

    def _open(self) -> None:
        failure = self._agreed(lambda: files.check_writable(self.directory) if self._rank == 0 else None)
        failure = failure or self._agreed(lambda: _wait_until_seen(self.directory))
        failure = failure or self._agreed(lambda: files.remove_leftovers(self.directory) if self._rank == 0 else None)
        if failure is not None:
            raise CheckpointError(
                str(self.directory), found=failure, expected="a directory all ranks can write", hint="run.root=DIRECTORY on shared storage"
            )

    def _write(self, step: int, extra: dict[str, Any]) -> int:
        temporary = files.temporary_path(self.directory, step)
        shared = state.model_tensors(self._model) | state.optimizer_tensors(self._model, self._optimizer)
        self._all_well(lambda: self._prepare(temporary, state.plain_bytes(shared)) if self._rank == 0 else None)
        self._all_well(lambda: storage.write_tensors(shared | state.rng_tensors(self._rank), temporary))
        contents = {"step": step, "world_size": self._world_size, "extra": extra, "metadata": self.metadata}
        contents |= {"model": _fingerprint(state.model_tensors(self._model)), "versions": _versions()}
        written: list[int] = []

        def commit() -> None:
            if self._rank == 0:
                written.append(files.commit(self.directory, step, state=contents, world_size=self._world_size))

        self._all_well(commit)
        self._prune()
        return written[0] if written else 0

    def _prune(self) -> None:
        failure = self._agreed(lambda: files.prune(self.directory, self.config.keep_last) if self._rank == 0 else None)
        if failure is not None:
            self._log(logging.ERROR, "older checkpoints stay in %s: %s", self.directory, failure)

    def _discard(self, step: int) -> None:
        temporary = files.temporary_path(self.directory, step)
        failure = self._agreed(lambda: files.remove(temporary) if self._rank == 0 else None)
        if failure is not None:
            self._log(logging.ERROR, "%s stays behind: %s", temporary, failure)

    def _prepare(self, temporary: Path, num_bytes: int) -> None:
        free = files.free_bytes(self.directory)
        if free < num_bytes:
            raise OSError(f"No space left on device: needs {format_bytes(num_bytes)}, {format_bytes(free)} free")
        files.remove(temporary)
        temporary.mkdir()

    def _failed(self, step: int, error: str) -> None:
        self._log(logging.ERROR, "checkpoint of step %d failed: %s", step, error)
        if self.config.on_error is OnSaveError.STOP:
            raise CheckpointError(
                f"checkpoint of step {step}",
                found=error,
                expected=f"to be written below {self.directory}; earlier checkpoints are intact",
                hint="make room there and resume, or train on without with checkpoint.on_error=continue",
            )

    def _agreed_choice(self) -> tuple[Path | None, tuple[str, ...]]:
        box: list[Any] = [self._read(self.directory, self._choose) if self._rank == 0 else self._read(self.directory, lambda: None)]
        if self._world_size > 1:
            dist.broadcast_object_list(box, src=0)
        return box[0]

    def _choose(self) -> tuple[Path | None, tuple[str, ...]]:
        skipped: list[str] = []
        for info in reversed(files.scan(self.directory)):
            if info.is_whole:
                return info.path, tuple(skipped)
            skipped.append(f"{info.path}: {info.problem}")
        return None, tuple(skipped)

    def _load(self, path: Path, skipped: tuple[str, ...]) -> Restored:
        contents, saved = self._read(path, lambda: (files.read_state(path), storage.read_index(path)))
        model = state.model_tensors(self._model)
        self._check_model(path, state.differences(model, saved))
        state.allocate_optimizer(self._model, self._optimizer, saved)
        rng = {
            key: torch.empty(entry.size, dtype=torch.uint8) for key, entry in saved.items() if key.startswith(f"{state.RNG}{self._rank}.")
        }
        tensors = model | state.optimizer_tensors(self._model, self._optimizer) | rng
        self._read(path, lambda: storage.read_tensors(tensors, path))
        step, world_size = contents["step"], contents["world_size"]
        if same_layout := world_size == self._world_size:
            state.set_rng(rng, self._rank)
        else:
            state.seed_rng(int(self.metadata.get("seed", 0)), step, self._rank)
        return Restored(step, path, contents["extra"], contents["metadata"], same_layout, skipped)

    def _read(self, path: Path, action: Callable[[], T]) -> T:
        results: list[T] = []
        failure = self._agreed(lambda: results.append(action()))
        if failure is not None:
            raise CheckpointError(
                str(path),
                found=f"contents that cannot be read ({failure})",
                expected="the files as they were written",
                hint=f"mv {path} elsewhere to go on from the checkpoint before it",
            )
        return results[0]

    def _check_model(self, path: Path, differing: list[str]) -> None:
        if differing:
            more = f"\n    and {len(differing) - 5} more" if len(differing) > 5 else ""
            raise CheckpointError(
                str(path),
                found="another model's weights:\n    " + "\n    ".join(differing[:5]) + more + "\n  ",
                expected="the weights of the configured model",
                hint="run.id=ANOTHER_NAME for a new run, or the model this run was started with",
            )

    def _nothing_whole(self, skipped: tuple[str, ...]) -> CheckpointError:
        return CheckpointError(
            str(self.directory),
            found="only damaged checkpoints:\n    " + "\n    ".join(skipped) + "\n  ",
            expected="at least one whole checkpoint",
            hint=f"bring the files back, or rm -r {self.directory} to start again from step 0",
        )

    def _all_well(self, action: Callable[[], object]) -> None:
        failure = self._agreed(action)
        if failure is not None:
            raise _SaveError(failure)

    def _agreed(self, action: Callable[[], object]) -> str | None:
        """Runs `action` on this rank, then meets all ranks: the first failure of any of them, on every one."""
        mine: str | None = None
        try:
            action()
        except storage.FAILURES as error:
            mine = storage.describe(error)
            log.debug("checkpoint failure on rank %d", self._rank, exc_info=True)
        if self._world_size == 1:
            return mine
        theirs: list[str | None] = [None] * self._world_size
        dist.all_gather_object(theirs, mine)
        return next((text if "(rank " in text else f"{text} (rank {rank})" for rank, text in enumerate(theirs) if text is not None), None)

    def _log(self, level: int, text: str, *args: object) -> None:
        if self._rank == 0:
            log.log(level, text, *args)


class _SaveError(Exception):
    """The save failed somewhere; all ranks have the same text."""


def _fingerprint(model: dict[str, Tensor]) -> str:
    """A hash of the weights' names, shapes and dtypes."""
    shapes = [[key, list(value.shape), str(value.dtype)] for key, value in model.items()]
    return hashlib.sha256(json.dumps(shapes).encode()).hexdigest()


def _versions() -> dict[str, str]:
    return {"torch": torch.__version__, "efflaunch": _own_version()}


def _own_version() -> str:
    try:
        return version("efflaunch")
    except PackageNotFoundError:
        return "not installed"


def _wait_until_seen(directory: Path) -> None:
    deadline = time.monotonic() + SEEN_S
    while not directory.is_dir():
        if time.monotonic() > deadline:
            raise FileNotFoundError(f"no directory {directory} on every node")
        time.sleep(0.1)
