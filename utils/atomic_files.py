"""Small file operations that survive a power cut: atomic writes, synced renames, a lock between processes."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import UserError

FULL = (errno.ENOSPC, errno.EDQUOT)
"""Error numbers of a disk, or a quota of one, that has no room left."""


class FullDiskError(UserError):
    """Raised where a file could not be written for want of room; the file as it was before is intact."""


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
    except OSError as error:
        # An error of a write names no file.
        error.filename = error.filename or str(path)
        raise
    finally:
        part.unlink(missing_ok=True)
    sync(path.parent)


def write_cache(path: Path, text: str, log: logging.Logger) -> None:
    """write_atomic of what can be made again: where it cannot be written, that is logged and nothing ends."""
    try:
        write_atomic(path, text)
    except OSError as error:
        log.warning("%s cannot be written: %s", path, error.strerror)


@contextmanager
def full_disk_named() -> Iterator[None]:
    """Raises FullDiskError for an OSError of a disk without room; every other error is passed on as it is."""
    try:
        yield
    except OSError as error:
        if error.errno not in FULL:
            raise
        raise full_disk(error) from error


def full_disk(error: OSError) -> FullDiskError:
    """FullDiskError of an error in FULL, which names the file it is about."""
    where, reason = str(error.filename or "a file"), error.strerror or str(error)
    return FullDiskError(where, found=reason, expected="room to write it", hint="make room on that disk, then the same command again")


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock file `path`, waiting for whoever has it; the kernel frees it when its holder dies."""
    with open(path, "a") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        try:
            yield
        finally:
            fcntl.flock(stream, fcntl.LOCK_UN)
