"""Small file operations that survive a power cut: atomic writes, synced renames, a lock between processes."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import shlex
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import UserError

FULL = (errno.ENOSPC, errno.EDQUOT)
"""Error numbers of a disk, or a quota of one, that has no room left."""


_HINTS: dict[int, tuple[str, str]] = {
    **dict.fromkeys(FULL, ("room to write it", "make room on that disk, then the same command again")),
    **dict.fromkeys((errno.EACCES, errno.EPERM), ("one that this user may use", "another path, or the rights to this one: ls -ld PATH")),
    errno.EROFS: ("a file system that can be written", "another path"),
    **dict.fromkeys((errno.ENAMETOOLONG, errno.ELOOP, errno.ENOTDIR, errno.EISDIR), ("a path that can be used", "another path")),
}
"""What is expected, and what to type, for errors that paths and disks of the user's make."""
_SHOWN = 200


class FileError(UserError):
    """Raised where a path or a disk is the user's to mend; a file that was to be written is as it was before."""


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
def file_errors_named() -> Iterator[None]:
    """Raises FileError for an OSError that the user can mend: no room, no right, no such kind of path. Others are passed on as they are."""
    try:
        yield
    except OSError as error:
        if error.errno not in _HINTS:
            raise
        expected, hint = _HINTS[error.errno]
        path = str(error.filename or "a file")
        where = path if len(path) <= _SHOWN else f"{path[:_SHOWN]}... ({len(path)} characters)"
        raise FileError(where, found=os.strerror(error.errno), expected=expected, hint=hint.replace("PATH", shlex.quote(where))) from error


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock file `path`, waiting for whoever has it; the kernel frees it when its holder dies."""
    with open(path, "a") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        try:
            yield
        finally:
            fcntl.flock(stream, fcntl.LOCK_UN)
