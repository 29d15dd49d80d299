"""Measures the storage under a directory: room, locks, renames, speed of one file written through to the disk and read back."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import psutil

from ...units import format_bytes
from .finding import Finding, State

TOPIC = "storage"
LEAST_ROOM = 10 << 30
_BLOCK = 1 << 20
_NETWORK = ("nfs", "nfs4", "lustre", "gpfs", "cifs", "smb3", "beegfs", "ceph", "fuse.ceph", "wekafs", "glusterfs")


@dataclass(frozen=True, kw_only=True, slots=True)
class Speed:
    """Bytes a second of one file and one process."""

    write: float
    """Until fsync returned."""
    read: float
    """After the kernel was asked to forget the file; a network server may still remember it."""


def storage(directory: Path, num_bytes: int) -> list[Finding]:
    """Judge the storage of a directory. Writes and removes one file of `num_bytes` in it; 0: nothing is written."""
    kind = file_system(directory)
    room = shutil.disk_usage(directory).free
    shared = "shared by nodes" if kind in _NETWORK else "of this machine alone, by its kind"
    found = [
        _finding("file system", State.OK, f"{kind} at {directory}, {shared}"),
        _finding(
            "free space",
            State.WARNING if room < LEAST_ROOM else State.OK,
            format_bytes(room),
            "checkpoint.keep, or another run.root" if room < LEAST_ROOM else "",
        ),
    ]
    try:
        with tempfile.TemporaryDirectory(prefix=".efflaunch-doctor-", dir=directory) as folder:
            found.append(_locks(Path(folder)))
            if num_bytes:
                found.append(_speed(measure(Path(folder) / "probe", num_bytes), num_bytes))
    except OSError as error:
        found.append(_finding("writing", State.BROKEN, f"{error.strerror or error}: {directory}", "a run.root that you may write to"))
    return found


def _finding(name: str, state: State, found: str, hint: str = "") -> Finding:
    return Finding(topic=TOPIC, name=name, state=state, found=found, hint=hint)


def file_system(directory: Path) -> str:
    """The kind of file system a directory lies on, as /proc/mounts names it."""
    here = directory.resolve()
    mounts = {Path(part.mountpoint): part.fstype for part in psutil.disk_partitions(all=True)}
    return next((mounts[path] for path in (here, *here.parents) if path in mounts), "unknown")


def _locks(folder: Path) -> Finding:
    """Run directories are locked by flock, and checkpoints appear by rename."""
    path = folder / "lock"
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            hint = "one launch at a time for each run directory: it is guarded by signs of life alone (docs/runs.md)"
            return _finding("locks", State.WARNING, f"flock: {error.strerror or error}", hint)
    path.rename(folder / "renamed")
    return _finding("locks", State.OK, "flock and rename work")


def measure(path: Path, num_bytes: int) -> Speed:
    """Write a file of at least `num_bytes` bytes that do not compress, then read it from the disk."""
    block, blocks = os.urandom(_BLOCK), max(1, -(-num_bytes // _BLOCK))
    start = time.perf_counter()
    with path.open("wb", buffering=0) as file:
        for _ in range(blocks):
            file.write(block)
        os.fsync(file.fileno())
    written = time.perf_counter()
    with path.open("rb", buffering=0) as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        begin = time.perf_counter()
        while file.read(_BLOCK):
            pass
    end = time.perf_counter()
    return Speed(write=blocks * _BLOCK / (written - start), read=blocks * _BLOCK / (end - begin))


def _speed(speed: Speed, num_bytes: int) -> Finding:
    words = f"{format_bytes(speed.write)}/s written, {format_bytes(speed.read)}/s read (one file of {format_bytes(num_bytes)})"
    hint = f"cluster.storage_bandwidth={speed.write:.2g} plans checkpoints by it"
    return _finding("speed", State.OK, words, hint)
