"""Checkpoint directories on disk: which are whole, how one becomes visible, which are removed. Pure files, no torch.

    RUN_DIR/checkpoints/step-00000100/
        .metadata, __0_0.distcp ...   torch.distributed.checkpoint's own format
        state.json                    step, sampler, schedule, config hash, layout, model config
        COMMIT                        sizes of all the others

Note: commit. A directory is written as `step-N.tmp`; its files and itself are fsynced, COMMIT is written last and
fsynced, then the directory is renamed to `step-N` and the parent fsynced. So a directory without `.tmp` was whole
when it appeared, and whatever has been cut off since shows in the sizes.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..durable import sync

COMMIT_FILE = "COMMIT"
STATE_FILE = "state.json"
FOLDER = "checkpoints"
FORMAT = 1
_NAME = re.compile(r"^step-(\d{8,})$")
_LEFTOVER = re.compile(r"^step-(\d{8,})\.(tmp|old|trash)$")


@dataclass(frozen=True, slots=True)
class CheckpointInfo:
    """One committed directory, as far as its names and sizes tell."""

    path: Path
    step: int
    """Optimizer updates made."""
    num_bytes: int
    time: float
    """When it was committed, seconds since 1970."""
    world_size: int
    problem: str | None
    """Why it cannot be restored; None: COMMIT is readable and every file has its size."""

    @property
    def is_whole(self) -> bool:
        return self.problem is None


def list_checkpoints(run_dir: Path) -> list[CheckpointInfo]:
    """The run's committed checkpoints, oldest first, damaged ones included; empty where there is none."""
    return scan(Path(run_dir) / FOLDER)


def scan(directory: Path) -> list[CheckpointInfo]:
    """As list_checkpoints, for the folder that holds the `step-N` directories."""
    if not directory.is_dir():
        return []
    found = ((int(match[1]), entry) for entry in directory.iterdir() if (match := _NAME.match(entry.name)))
    return [_inspect(path, step) for step, path in sorted(found)]


def _inspect(path: Path, step: int) -> CheckpointInfo:
    try:
        commit = json.loads((path / COMMIT_FILE).read_text())
        files: dict[str, int] = {str(name): int(size) for name, size in commit["files"].items()}
        info = CheckpointInfo(path, step, sum(files.values()), float(commit["time"]), int(commit["world_size"]), None)
        problem = _wrong_format(commit) or _wrong_sizes(path, files)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return CheckpointInfo(path, step, 0, 0.0, 0, f"{COMMIT_FILE} cannot be read ({type(error).__name__}: {error})")
    return info if problem is None else CheckpointInfo(path, step, info.num_bytes, info.time, info.world_size, problem)


def _wrong_format(commit: dict[str, Any]) -> str | None:
    return None if commit["format"] == FORMAT else f"written in format {commit['format']}, this version reads {FORMAT}"


def _wrong_sizes(path: Path, files: dict[str, int]) -> str | None:
    for name, size in files.items():
        try:
            found = (path / name).stat().st_size
        except FileNotFoundError:
            return f"{name} is missing"
        if found != size:
            return f"{name} has {found} bytes instead of {size}"
    return None


def read_state(path: Path) -> dict[str, Any]:
    """`{"extra": ..., "metadata": ...}` as given to save and to the engine."""
    state: dict[str, Any] = json.loads((path / STATE_FILE).read_text())
    return state


def step_path(directory: Path, step: int) -> Path:
    return directory / f"step-{step:08d}"


def temporary_path(directory: Path, step: int) -> Path:
    return directory / f"step-{step:08d}.tmp"


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
    """What an ordinary user may still write there."""
    stat = os.statvfs(directory)
    return stat.f_bavail * stat.f_frsize


def commit(directory: Path, step: int, *, state: dict[str, Any], world_size: int) -> int:
    """Turns the written `step-N.tmp` into `step-N` (see Note: commit); its bytes. OSError leaves the old state in place."""
    temporary, final = temporary_path(directory, step), step_path(directory, step)
    _write_json(temporary / STATE_FILE, state)
    for path in temporary.iterdir():
        sync(path)
    files = {path.name: path.stat().st_size for path in sorted(temporary.iterdir())}
    record = {"format": FORMAT, "step": step, "time": time.time(), "world_size": world_size, "files": files}
    _write_json(temporary / COMMIT_FILE, record)
    sync(temporary)
    with _moved_away(final):
        temporary.rename(final)
        sync(directory)
    return sum(files.values())


@contextmanager
def _moved_away(final: Path) -> Iterator[None]:
    """A directory of the same step (damaged, or written by a run this one repeats) stands aside until the new one is there."""
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


def _write_json(path: Path, value: dict[str, Any]) -> None:
    with path.open("w") as file:
        json.dump(value, file, indent=1, allow_nan=False)
        file.flush()
        os.fsync(file.fileno())


def remove(path: Path) -> None:
    """Removes a checkpoint: renamed first, so that a half-removed one is never taken for whole."""
    if not path.exists():
        return
    trash = path if _LEFTOVER.match(path.name) else path.with_name(path.name + ".trash")
    if trash != path:
        shutil.rmtree(trash, ignore_errors=True)
        path.rename(trash)
    shutil.rmtree(trash)


def remove_leftovers(directory: Path) -> None:
    """Removes what an interrupted save or removal left behind; recovers a checkpoint that stood aside."""
    for entry in sorted(directory.iterdir()):
        match = _LEFTOVER.match(entry.name)
        if match is None:
            continue
        final = step_path(directory, int(match[1]))
        if match[2] == "old" and not final.exists():
            entry.rename(final)
        else:
            shutil.rmtree(entry)


def prune(directory: Path, keep_last: int) -> None:
    """Keeps the newest `keep_last` whole checkpoints (never fewer than one) and removes every other one, damaged ones too."""
    infos = scan(directory)
    kept = {info.path for info in [info for info in infos if info.is_whole][-max(1, keep_last) :]}
    if kept:
        for info in infos:
            if info.path not in kept:
                remove(info.path)
