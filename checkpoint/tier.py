"""Keeps checkpoints in a second place: a directory or an object store behind fsspec. Each has its own commit record.

An object store has no rename: a checkpoint counts there once COMMIT is, which is put last. No torch.
"""

from __future__ import annotations

import os
import queue
import threading
import uuid
from pathlib import Path
from typing import Any

from ..errors import CheckpointError
from ..utils.atomic_files import sync
from . import files
from .manifest import Manifest, chunk_spans, digest
from .progress import RestoreProgress

REACH_S = 60.0
OWNER_FILE = "RUN"
RUN_FILE = "run.yaml"
"""Name by which a run directory is known: launcher.rundir.run_dir's."""
_PROBE = b"efflaunch"


def open_tier(address: str) -> Tier:
    """The place behind an address; CheckpointError where nobody can tell what it is. Nothing is reached yet."""
    try:
        return Tier(address)
    except (ImportError, ValueError, OSError) as error:
        raise _unusable(address, str(error), "a directory or an fsspec address") from error


def reach(address: str, directory: Path) -> Tier:
    """Open the tier of a run with checkpoints in `directory`; makes the place, and proves that it keeps what is put there.

    CheckpointError where it does not, or does not answer within REACH_S, or as of `check_place`, or where it is another run's or
    holds other things.
    """
    tier = check_place(address, directory)
    answer: queue.SimpleQueue[str | None] = queue.SimpleQueue()
    threading.Thread(target=lambda: answer.put(tier.trouble(directory.absolute().parent.name)), name="mirror probe", daemon=True).start()
    try:
        trouble = answer.get(timeout=REACH_S)
    except queue.Empty:
        trouble = f"no answer within {REACH_S:.0f} s"
    if trouble is not None:
        raise _unusable(address, trouble, "a place that can be reached and written")
    return tier


def check_place(address: str, directory: Path) -> Tier:
    """Open the tier of a run with checkpoints in `directory`. Nothing is written, and nothing reached but a place on this machine.

    CheckpointError where the place is the run's own, the current directory, or inside of another run's (each would remove the
    other's checkpoints, and go on from them), or is none that can be written.
    """
    tier = open_tier(address)
    try:
        _check_local(tier, directory)
    except (OSError, RuntimeError) as error:
        # A loop of links is a RuntimeError to pathlib.
        raise _unusable(address, str(error), "a path that can be used") from error
    return tier


def _check_local(tier: Tier, directory: Path) -> None:
    address, own, expected = tier.address, tier.local_path, "a folder of its own for this run, outside of run directories"
    if own is None:
        return
    if own == Path.cwd() or own.is_relative_to(directory.resolve()) or directory.resolve().is_relative_to(own):
        raise _unusable(address, f"{own}, which holds other things", expected)
    if run := next((folder for folder in (own, *own.parents) if (folder / RUN_FILE).is_file()), None):
        raise _unusable(address, f"{own}, in the run directory {run}", expected)
    there = next(folder for folder in (own, *own.parents) if folder.exists())
    if not there.is_dir() or (there == own and not os.access(own, os.W_OK | os.X_OK)):
        problem = "which is no directory" if not there.is_dir() else "which cannot be written"
        raise _unusable(address, f"{there}, {problem}", "a place that can be reached and written")


def _unusable(address: str, actual: str, expected: str) -> CheckpointError:
    hint = "checkpoint.mirror=DIRECTORY, its credentials, or checkpoint.mirror=null to go without"
    return CheckpointError("checkpoint.mirror", found=f"{address} ({actual})", expected=expected, hint=hint)


class Tier:
    """A second place; `address`: a directory, or an fsspec address as `s3://bucket/run`. A store's errors come as OSError."""

    def __init__(self, address: str) -> None:
        from fsspec.core import url_to_fs

        self.address = address
        self._fs: Any
        self._fs, self._root = url_to_fs(address)
        self._is_local = "file" in (self._fs.protocol if isinstance(self._fs.protocol, tuple) else (self._fs.protocol,))

    @property
    def local_path(self) -> Path | None:
        """Path on this machine's file systems; None: it is elsewhere."""
        return Path(self._root).resolve() if self._is_local else None

    def trouble(self, run: str) -> str | None:
        """Write, read and remove a small object, and make the place the run's; returns what went wrong, None: nothing."""
        path = f"{self._root}/.probe-{uuid.uuid4().hex}"
        try:
            self._fs.makedirs(self._root, exist_ok=True)
            self._fs.pipe_file(path, _PROBE)
            kept = self._fs.cat_file(path)
            self._fs.rm_file(path)
            other = self._other()
            owner = run if other is not None else self._owner(run)
        except Exception as error:  # whatever a store raises, none of it ends well
            return f"{type(error).__name__}: {error}"
        if kept != _PROBE:
            return "what is written there is not what is read"
        if other is not None:
            return f"it holds {other!r}, which is no checkpoint: a folder of its own for this run is needed"
        return None if owner == run else f"it belongs to the run {owner!r}, by the file {OWNER_FILE} there"

    def _other(self) -> str | None:
        """The name of something there that no mirror makes; None: there is nothing of the kind. Hidden names are others' probes."""
        self._fs.invalidate_cache()
        names = sorted(str(entry).rstrip("/").rpartition("/")[2] for entry in self._fs.ls(self._root, detail=False))
        return next((name for name in names if name != OWNER_FILE and not name.startswith((".", "step-", "lost+found"))), None)

    def _owner(self, run: str) -> str:
        """The name of the run whose place this is: `run`, where it was nobody's."""
        path = f"{self._root}/{OWNER_FILE}"
        if not self._fs.exists(path):
            self._fs.pipe_file(path, run.encode())
        return str(self._fs.cat_file(path).decode("utf-8", "replace")).strip()

    def steps(self) -> list[int]:
        """Steps of the checkpoints committed here, oldest first; an empty list where there are none."""
        if not self._fs.exists(self._root):
            return []
        self._fs.invalidate_cache()
        names = [str(entry).rstrip("/").rpartition("/")[2] for entry in self._fs.ls(self._root, detail=False)]
        steps = [int(name.removeprefix("step-")) for name in names if name.startswith("step-") and name.removeprefix("step-").isdigit()]
        return [step for step in sorted(steps) if self._fs.exists(self._path(step, files.COMMIT_FILE))]

    def put(self, folder: Path, step: int, names: list[str]) -> int:
        """Copy files of a committed checkpoint here; returns their bytes. OSError where one did not arrive whole."""
        self._fs.makedirs(self._path(step), exist_ok=True)
        total = 0
        for name in names:
            target = self._path(step, name)
            self._fs.put_file(str(folder / name), target)
            size = (folder / name).stat().st_size
            if self._fs.size(target) != size:
                raise OSError(f"{target} has {self._fs.size(target)} bytes instead of {size}")
            self._sync(target)
            total += size
        return total

    def commit(self, folder: Path, step: int) -> None:
        """Commit after the files of every rank: from here on the checkpoint counts here."""
        self._fs.pipe_file(self._path(step, files.COMMIT_FILE), (folder / files.COMMIT_FILE).read_bytes())
        self._sync(self._path(step, files.COMMIT_FILE))
        self._sync(self._path(step))

    def record(self, step: int) -> dict[str, Any]:
        """The commit record of a step; ValueError, KeyError or OSError where it is not what was written."""
        return files.parse_commit(self._fs.cat_file(self._path(step, files.COMMIT_FILE)))

    def manifest(self, step: int, record: dict[str, Any], rank: int) -> Manifest:
        name = f"rank-{rank}.json"
        data = self._fs.cat_file(self._path(step, name))
        if digest(data) != record["manifests"][name]:
            raise ValueError(f"{name} is not what was written")
        return Manifest.from_bytes(data)

    def fetch(self, step: int, folder: Path, name: str, manifest: Manifest | None, progress: RestoreProgress) -> None:
        """Fetch a file into `folder`, fsynced; ValueError where its bytes are not those that were written."""
        target = folder / name
        with self._fs.open(self._path(step, name), "rb") as source, target.open("wb") as out:
            if manifest is None:
                out.write(source.read())
            else:
                record = manifest.file(name)
                for (offset, length), expected in zip(chunk_spans(record.num_bytes, manifest.chunk_bytes), record.chunks, strict=True):
                    data = source.read(length)
                    if digest(data) != expected:
                        raise ValueError(f"{self._path(step, name)}: bytes {offset} to {offset + length} are not what was written")
                    out.write(data)
                    progress.add(length)
            out.flush()
            os.fsync(out.fileno())

    def damage(self, step: int) -> list[str]:
        """Read a whole checkpoint and return what is wrong with it."""
        problems = []
        try:
            record = self.record(step)
            for rank in range(int(record["world_size"])):
                manifest = self.manifest(step, record, rank)
                problems += [text for file in manifest.files if (text := self._file_damage(step, file.name, manifest))]
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            problems.append(f"{type(error).__name__}: {error}")
        return problems

    def _file_damage(self, step: int, name: str, manifest: Manifest) -> str | None:
        record = manifest.file(name)
        with self._fs.open(self._path(step, name), "rb") as source:
            for (offset, length), expected in zip(chunk_spans(record.num_bytes, manifest.chunk_bytes), record.chunks, strict=True):
                if digest(source.read(length)) != expected:
                    return f"{name}: bytes {offset} to {offset + length} are not what was written"
        return None

    def remove(self, step: int) -> None:
        """Remove a checkpoint, COMMIT first, so that a half-removed one is never taken for whole."""
        self._fs.rm_file(self._path(step, files.COMMIT_FILE))
        self._fs.rm(self._path(step), recursive=True)

    def prune(self, keep_last: int) -> None:
        """Keeps the newest `keep_last` committed ones (never fewer than one)."""
        for step in self.steps()[: -max(1, keep_last)]:
            self.remove(step)

    def _path(self, step: int, name: str = "") -> str:
        return f"{self._root}/step-{step:08d}" + (f"/{name}" if name else "")

    def _sync(self, path: str) -> None:
        if self._is_local:
            sync(Path(path))


def own_files(folder: Path, rank: int) -> list[str]:
    """The files a rank puts there: its own and its manifest."""
    name = f"rank-{rank}.json"
    content = (folder / name).read_bytes()
    return [*(file.name for file in Manifest.from_bytes(content).files), name]
