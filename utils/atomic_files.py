"""Small file operations that survive a power cut: atomic writes, synced renames, a lock between processes."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path


def sync(path: Path) -> None:
    """Put a file's bytes, or a folder's names, on disk before returning."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomic(path: Path, data: bytes | str, at: Callable[[str], None] = lambda point: None) -> None:
    """`path` holds either its old content or all of `data` (text as UTF-8), whatever happens. Its directory must exist.

    `at` is told when it is `written`, `synced` and `renamed`, for tests that end the process there.
    """
    part = path.with_name(path.name + ".part")
    try:
        with open(part, "wb") as stream:
            stream.write(data.encode() if isinstance(data, str) else data)
            stream.flush()
            at("written")
            os.fsync(stream.fileno())
        at("synced")
        os.replace(part, path)
        at("renamed")
    finally:
        part.unlink(missing_ok=True)
    sync(path.parent)


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock file `path`, waiting for whoever has it; the kernel frees it when its holder dies."""
    with open(path, "a") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        try:
            yield
        finally:
            fcntl.flock(stream, fcntl.LOCK_UN)
