"""Manages checkpoint directories: which are whole, how one becomes visible, which are removed. Pure files, no torch.

    RUN_DIR/checkpoints/step-00000100/
        __R_0.distcp, .metadata   torch.distributed.checkpoint's own format, a file per rank
        index.json                .metadata as JSON
        state.json                step, sampler, schedule, config hash, layout, model config
        rank-R.json               what rank R wrote, with a hash of every chunk
        COMMIT                    sizes of all the others, hashes of the manifests, and its own
        PINNED, DAMAGED           never removed by retention; found damaged while reading, and how

Note: commit. Each rank's flusher writes into `step-N.tmp-ATTEMPT` and fsyncs its files, then its manifest, then the directory.
That manifest is its vote. Once every rank has voted, COMMIT is written and fsynced, the directory is fsynced and renamed to
`step-N`, and the parent is fsynced. So a directory without `.tmp` was whole when it appeared; what was cut off since shows in
the sizes, and what was changed since in the hashes. Where all trainers die after the last vote, the next start commits.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..utils.atomic_files import sync, write_atomic
from .manifest import Manifest, check_file_name, digest, manifest_name

COMMIT_FILE, STATE_FILE, PINNED_FILE, DAMAGED_FILE = "COMMIT", "state.json", "PINNED", "DAMAGED"
FOLDER = "checkpoints"
FORMAT = 2
_NAME = re.compile(r"^step-(\d{8,})$")
_LEFTOVER = re.compile(r"^step-(\d{8,})\.(tmp(?:-[\w.-]+)?|old|trash)$")


@dataclass(frozen=True, slots=True)
class CheckpointInfo:
    """One committed directory, as far as its names, sizes and manifests tell."""

    path: Path
    step: int
    """Optimizer updates made."""
    num_bytes: int
    time: float
    """When it was committed, seconds since 1970."""
    world_size: int
    problem: str | None
    """Why it cannot be restored; None: COMMIT and manifests are what was written and every file has its size."""
    is_pinned: bool = False

    @property
    def is_whole(self) -> bool:
        return self.problem is None


def list_checkpoints(run_dir: Path) -> list[CheckpointInfo]:
    """The run's committed checkpoints, oldest first, damaged ones included; empty where there is none."""
    return scan(Path(run_dir) / FOLDER)


def scan(directory: Path) -> list[CheckpointInfo]:
    """List checkpoints of the folder that holds the `step-N` directories."""
    if not directory.is_dir():
        return []
    steps = ((int(match[1]), entry) for entry in directory.iterdir() if (match := _NAME.match(entry.name)))
    return [inspect(path, step) for step, path in sorted(steps)]


def inspect(path: Path, step: int) -> CheckpointInfo:
    """Describe a committed directory from its files; tensors are not read."""
    pinned = (path / PINNED_FILE).exists()
    try:
        record = read_commit(path)
        files: dict[str, int] = {str(name): int(size) for name, size in record["files"].items()}
        problem = _wrong_sizes(path, files) or _wrong_manifests(path, record) or _marked(path)
        if int(record["step"]) != step:
            problem = f"{COMMIT_FILE} is of step {record['step']}"
        return CheckpointInfo(path, step, sum(files.values()), float(record["time"]), int(record["world_size"]), problem, pinned)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        problem = f"{COMMIT_FILE} cannot be read ({type(error).__name__}: {error})"
        return CheckpointInfo(path, step, 0, 0.0, 0, problem, pinned)


def read_commit(path: Path) -> dict[str, Any]:
    """The record of a committed directory; ValueError, KeyError or OSError where it is not what was written."""
    return parse_commit((path / COMMIT_FILE).read_bytes())


def parse_commit(data: bytes) -> dict[str, Any]:
    """Read a commit record from its bytes, as read_commit does."""
    record: dict[str, Any] = json.loads(data)
    if record["format"] != FORMAT:
        raise ValueError(f"written in format {record['format']}, this version reads {FORMAT}")
    claimed = record.pop("hash")
    if claimed != _hash_of(record):
        raise ValueError("its own hash does not match")
    for name in (*record["files"], *record["manifests"]):
        check_file_name(name)
    return record


def _hash_of(record: dict[str, Any]) -> str:
    return digest(json.dumps(record, sort_keys=True).encode())


def _wrong_sizes(path: Path, files: dict[str, int]) -> str | None:
    for name, size in files.items():
        try:
            num_bytes = (path / name).stat().st_size
        except FileNotFoundError:
            return f"{name} is missing"
        if num_bytes != size:
            return f"{name} has {num_bytes} bytes instead of {size}"
    return None


def _wrong_manifests(path: Path, record: dict[str, Any]) -> str | None:
    for name, expected in record["manifests"].items():
        if digest((path / name).read_bytes()) != expected:
            return f"{name} is not what was written"
    return None


def _marked(path: Path) -> str | None:
    mark = path / DAMAGED_FILE
    return f"marked as damaged: {mark.read_text().strip()}" if mark.exists() else None


def read_state(path: Path) -> dict[str, Any]:
    """`{"extra": ..., "metadata": ...}` as given to save and to the engine; ValueError where it is not what was written."""
    data = (path / STATE_FILE).read_bytes()
    manifest = read_manifest(path, read_commit(path), 0)
    chunks = [digest(data[i : i + manifest.chunk_bytes]) for i in range(0, len(data), manifest.chunk_bytes)]
    if tuple(chunks) != manifest.file(STATE_FILE).chunks:
        raise ValueError(f"{STATE_FILE} is not what was written")
    state: dict[str, Any] = json.loads(data)
    return state


def read_manifest(path: Path, record: dict[str, Any], rank: int) -> Manifest:
    """A rank's manifest, checked against the commit record; ValueError, KeyError or OSError otherwise."""
    name = manifest_name(rank)
    data = (path / name).read_bytes()
    if digest(data) != record["manifests"][name]:
        raise ValueError(f"{name} is not what was written")
    return Manifest.from_bytes(data)


def step_path(directory: Path, step: int) -> Path:
    return directory / f"step-{step:08d}"


def temporary_path(directory: Path, step: int, attempt: str) -> Path:
    return directory / f"step-{step:08d}.tmp-{attempt}"


def check_writable(directory: Path) -> None:
    """Makes the folder and proves that a file can be written there; OSError says why not."""
    directory.mkdir(parents=True, exist_ok=True)
    probe = directory / f".probe-{os.getpid()}"
    try:
        with probe.open("wb") as file:
            file.write(b"\0")
            os.fsync(file.fileno())
    finally:
        probe.unlink(missing_ok=True)


def free_bytes(directory: Path) -> int:
    """Bytes that an ordinary user may still write there."""
    stat = os.statvfs(directory)
    return stat.f_bavail * stat.f_frsize


def commit(temporary: Path, *, votes: dict[int, str] | None = None, at: Callable[[str], None] = lambda point: None) -> int:
    """Turns a directory in which every rank has voted into `step-N` (see Note: commit); returns its bytes.

    `votes`: the hash of each rank's manifest as the rank gave it; None: as they are on disk (adoption). OSError or
    ValueError leaves the old state in place. `at` is called with the named points (see faults).
    """
    manifests = _votes_on_disk(temporary, votes)
    first = Manifest.from_bytes((temporary / manifest_name(0)).read_bytes())
    for half in temporary.glob("*.part"):
        # Of a commit that was cut off; it is no part of the checkpoint.
        half.unlink()
    files = {path.name: path.stat().st_size for path in sorted(temporary.iterdir()) if path.name != COMMIT_FILE}
    record = {"format": FORMAT, "step": first.step, "attempt": first.attempt, "time": time.time(), "world_size": first.world_size}
    record |= {"files": files, "manifests": manifests}
    at("before_commit")
    write_atomic(temporary / COMMIT_FILE, json.dumps({**record, "hash": _hash_of(record)}, indent=1), lambda point: at(f"commit_{point}"))
    at("after_commit")
    publish(temporary, first.step, at)
    return sum(files.values())


def publish(temporary: Path, step: int, at: Callable[[str], None] = lambda point: None) -> None:
    """Rename a finished directory so that it counts."""
    final = step_path(temporary.parent, step)
    sync(temporary)
    at("folder_synced")
    with _moved_away(final):
        at("before_rename")
        temporary.rename(final)
        at("renamed")
        sync(temporary.parent)
        at("after_rename")


def _votes_on_disk(temporary: Path, votes: dict[int, str] | None) -> dict[str, str]:
    """Hash of every rank's manifest by name; ValueError where one is missing, of another attempt, or names files that are not there."""
    first = Manifest.from_bytes((temporary / manifest_name(0)).read_bytes())
    hashes: dict[str, str] = {}
    for rank in range(first.world_size):
        path = temporary / manifest_name(rank)
        if not path.exists():
            raise ValueError(f"{path.name} was written by another rank and is not seen by this one")
        data = path.read_bytes()
        manifest = Manifest.from_bytes(data)
        if (manifest.attempt, manifest.step, manifest.rank) != (first.attempt, first.step, rank):
            raise ValueError(f"{path.name} is of another attempt")
        hashes[path.name] = digest(data)
        if votes is not None and votes[rank] != hashes[path.name]:
            raise ValueError(f"{path.name} is not what rank {rank} voted for")
        problem = _wrong_sizes(temporary, {record.name: record.num_bytes for record in manifest.files})
        if problem is not None:
            raise ValueError(problem)
    return hashes


@contextmanager
def _moved_away(final: Path) -> Iterator[None]:
    """Move a directory of the same step (damaged, or of a run this one repeats) aside until the new one is there."""
    if not final.exists():
        yield
        return
    old = final.with_name(final.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    final.rename(old)
    try:
        yield
    except OSError:
        old.rename(final)
        raise
    shutil.rmtree(old)


def mark_damaged(path: Path, text: str) -> None:
    """Mark a checkpoint so that it counts for nothing; OSError where that cannot be written down."""
    write_atomic(path / DAMAGED_FILE, text + "\n")


def remove(path: Path) -> None:
    """Removes a checkpoint: renamed first, so that a half-removed one is never taken for whole."""
    if path.exists():
        remove_tree(throw_away(path))


def throw_away(path: Path) -> Path:
    """Rename a checkpoint so that it counts for nothing; returns where it is now."""
    if path.name.endswith(".trash"):
        return path
    trash = path.with_name(path.name.partition(".")[0] + ".trash")
    shutil.rmtree(trash, ignore_errors=True)
    path.rename(trash)
    return trash


def remove_tree(path: Path) -> None:
    """Remove a tree that another process may be removing too: what is gone already is no error."""

    def judge(function: object, name: str, info: tuple[type[BaseException], BaseException, object]) -> None:
        if not isinstance(info[1], FileNotFoundError):
            raise info[1]

    shutil.rmtree(path, onerror=judge)


def settle_leftovers(directory: Path, wait_s: float, *, leave_busy: bool = False) -> list[int]:
    """Settle what interrupted saves and removals left behind: finished attempts are committed, the rest is removed.

    Returns the steps committed. Waits up to `wait_s` for flushers that outlived their trainers; `leave_busy`: what they still
    write is left alone. OSError as it comes.
    """
    adopted = []
    for entry in sorted(directory.iterdir()):
        match = _LEFTOVER.match(entry.name)
        if match is None:
            continue
        final = step_path(directory, int(match[1]))
        if match[2].startswith("tmp") and _finished(entry, wait_s):
            commit(entry)
            adopted.append(int(match[1]))
        elif match[2].startswith("tmp") and leave_busy and any(map(_is_locked, entry.glob("__*_0.distcp"))):
            continue
        elif match[2] == "old" and not final.exists():
            entry.rename(final)
        else:
            remove_tree(entry)
    return adopted


def _finished(temporary: Path, wait_s: float) -> bool:
    """Whether every rank has voted; waits while a rank's flusher still works on it."""
    deadline = time.monotonic() + wait_s
    while True:
        busy = {_rank_of(path): _is_locked(path) for path in temporary.glob("__*_0.distcp")}
        # Locks were looked at first: who holds none has given its vote by now, or never will.
        given_up = any(not is_locked and not (temporary / manifest_name(rank)).exists() for rank, is_locked in busy.items())
        try:
            _votes_on_disk(temporary, None)
            return True
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            # A vote is missing. It may come while somebody still writes.
            if given_up or not any(busy.values()) or time.monotonic() > deadline:
                return False
        time.sleep(0.05)


def _rank_of(path: Path) -> int:
    return int(path.name.removeprefix("__").partition("_")[0])


def _is_locked(path: Path) -> bool:
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        return False
    except BlockingIOError:
        return True
    except OSError:
        # A file system without locks.
        return False
    finally:
        os.close(descriptor)


def retained(infos: list[CheckpointInfo], keep_last: int, keep_every: int | None = None) -> set[Path]:
    """Checkpoints to keep: the newest `keep_last` whole ones (at least one), whole multiples of `keep_every`, pinned ones."""
    whole = [info for info in infos if info.is_whole]
    newest = whole[-max(1, keep_last) :]
    kept = {info.path for info in newest}
    kept |= {info.path for info in whole if keep_every is not None and info.step % keep_every == 0}
    kept |= {info.path for info in infos if info.is_pinned}
    return kept if newest else set()
