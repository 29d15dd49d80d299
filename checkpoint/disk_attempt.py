"""Writes one rank's files of one attempt: chunks in any order, then everything durable at once."""

from __future__ import annotations

import errno
import fcntl
import os
import threading
from collections.abc import Callable
from concurrent.futures import Executor, Future
from pathlib import Path

from ..utils.atomic_files import sync
from .diskfile import DiskFile
from .faults import Faults
from .flusher_protocol import Message
from .manifest import FileRecord, Manifest, manifest_name


class DiskAttempt:
    """One rank's open files. One thread opens them; several call `write` at a time, `finish` comes after all of them."""

    def __init__(self, message: Message, faults: Faults) -> None:
        self.folder, self.facts, self.faults = Path(message["folder"]), message["facts"], faults
        self.names: list[tuple[str, int]] = [(str(name), int(size)) for name, size in message["files"]]
        self.files: list[DiskFile] = []
        self.hashes: list[dict[int, str]] = [{} for _ in self.names]
        """Hashes of each file's chunks, by offset."""
        self.parts: list[Future[None]] = []
        self.error: str | None = None
        """The first thing that went wrong."""
        self._lock = threading.Lock()
        self.faults.at("begin")
        self.folder.mkdir(parents=True, exist_ok=True)
        _check_room(self.folder, int(message["needs_bytes"]))
        try:
            for name, size in self.names:
                self.files.append(DiskFile(self.folder / name, size))
            # Held until the manifest is there: who finds the lock free and no manifest knows that none will come.
            _lock(self.files[0].descriptor)
            self.faults.at("opened")
        except OSError:
            self.close()
            raise

    def fail(self, error: str) -> bool:
        """Record a failure; True for the first."""
        with self._lock:
            first = self.error is None
            self.error = error if first else self.error
            return first

    def write(self, file: int, offset: int, data: memoryview, padded: memoryview) -> None:
        """Write a chunk; `padded` is `data` up to the end of its last block."""
        self.faults.at("chunk")
        self.files[file].write(offset, data, padded)

    def manifest(self) -> Manifest:
        """The manifest, once every chunk is hashed."""
        hashed = zip(self.names, self.hashes, strict=True)
        records = (FileRecord(name, size, tuple(chunks[at] for at in sorted(chunks))) for (name, size), chunks in hashed)
        return Manifest(**self.facts, files=tuple(records))

    def finish(self, threads: Executor, check: Callable[[], None]) -> bytes:
        """Make everything durable; returns the manifest's bytes. `check` may raise as long as there is no manifest."""
        self.faults.at("before_fsync")
        # At once: a journal takes them all in one turn.
        list(threads.map(DiskFile.finish, self.files))
        self.faults.at("after_fsync")
        check()
        data = self.manifest().to_bytes()
        self.faults.at("before_manifest")
        path = self.folder / manifest_name(self.facts["rank"])
        part = path.with_name(path.name + ".part")
        with part.open("wb") as stream:
            stream.write(data)
            stream.flush()
            self.faults.at("manifest_written")
            os.fsync(stream.fileno())
        self.faults.at("manifest_synced")
        part.rename(path)
        self.faults.at("manifest_renamed")
        sync(self.folder)
        self.faults.at("after_manifest")
        self.close()
        return data

    def close(self) -> None:
        """Close the files, after the last write has ended."""
        for file in self.files:
            file.close()


def _lock(descriptor: int) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        # A file system without locks: a start that comes while this writes does not wait for it, and the attempt is lost.
        if error.errno not in (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS):
            raise


def _check_room(folder: Path, needs_bytes: int) -> None:
    stat = os.statvfs(folder)
    free = stat.f_bavail * stat.f_frsize
    if free < needs_bytes:
        raise OSError(28, f"No space left on device: needs {needs_bytes} bytes for all ranks, {free} free", str(folder))
