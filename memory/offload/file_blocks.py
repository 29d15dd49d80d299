"""One rank's file of activations: its room taken before the run, its name gone before the first byte, read and written by any thread."""

from __future__ import annotations

import errno
import logging
import mmap
import os
import secrets
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

from ...errors import ConfigError, EfflaunchError
from ...units import format_bytes
from ...utils.atomic_files import FULL
from .allocator import Extents
from .host_pool import BLOCK_BYTES

log = logging.getLogger(__name__)

DIRECT_BYTES = 4096
"""What O_DIRECT asks of addresses, offsets and lengths on every disk in use."""
KEY = "memory.offload_dir"


class OffloadFile:
    """`capacity_bytes` of a directory's disk, rounded up to whole blocks.

    The name is removed as soon as the file is open: the system frees the room when the process ends, however it ends.
    """

    def __init__(self, directory: Path, capacity_bytes: int) -> None:
        """ConfigError if the directory cannot be written or has less room."""
        total = -(-capacity_bytes // BLOCK_BYTES) * BLOCK_BYTES
        self.directory = directory
        self.extents = Extents([total], BLOCK_BYTES)
        try:
            self._fd, self.is_direct = _open_nameless(directory, total)
        except OSError as error:
            raise full(directory, total) if error.errno in FULL else unusable(directory, error) from error
        if not self.is_direct:
            log.info("%s=%s: the filesystem takes no direct writes, so they pass through the system's cache", KEY, directory)

    def write(self, data: memoryview, offset: int) -> None:
        """All of it; OSError if the disk does not take it."""
        while data:
            written = os.pwrite(self._fd, data, offset)
            data, offset = data[written:], offset + written

    def read(self, into: memoryview, offset: int) -> None:
        """All of it; OSError if the disk does not give it."""
        while into:
            num_read = os.preadv(self._fd, [into], offset)
            if num_read == 0:
                raise OSError(errno.EIO, "the file ends before what was written to it")
            into, offset = into[num_read:], offset + num_read

    def close(self) -> None:
        os.close(self._fd)


def _open_nameless(directory: Path, num_bytes: int) -> tuple[int, bool]:
    """A new file with its room taken and its name gone, and whether it takes direct writes. OSError."""
    path = directory / f"efflaunch-offload-{os.getpid()}-{secrets.token_hex(4)}"
    with ExitStack() as opened:
        plain = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        opened.callback(os.close, plain)
        try:
            direct = _open_direct(path)
        finally:
            path.unlink()
        if direct is not None:
            opened.callback(os.close, direct)
        # Asked first, or the disk would be filled to its last block before the system says so.
        stat = os.statvfs(directory)
        if stat.f_bavail * stat.f_frsize < num_bytes:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        os.posix_fallocate(plain, 0, max(num_bytes, DIRECT_BYTES))
        is_direct = direct is not None and _takes_direct_writes(direct)
        return os.dup(direct if direct is not None and is_direct else plain), is_direct


def _open_direct(path: Path) -> int | None:
    try:
        return os.open(path, os.O_RDWR | os.O_DIRECT | os.O_CLOEXEC)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        return None


def _takes_direct_writes(fd: int) -> bool:
    """Some filesystems open a file for direct writes and then refuse them."""
    page = memoryview(mmap.mmap(-1, DIRECT_BYTES))
    try:
        os.pwrite(fd, page, 0)
        os.preadv(fd, [page], 0)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        return False
    return True


def unusable(directory: Path, error: OSError) -> ConfigError:
    return ConfigError(
        f"{KEY}={directory}",
        found=(error.strerror or str(error)).lower(),
        expected="a directory on a local disk of every node that this user may write to",
        hint=f"mkdir -p {directory} on every node, or {KEY}=ANOTHER",
    )


def full(directory: Path, needed_bytes: int) -> ConfigError:
    stat = os.statvfs(directory)
    return ConfigError(
        f"{KEY}={directory}",
        found=f"{format_bytes(stat.f_bavail * stat.f_frsize)} free",
        expected=f"{format_bytes(needed_bytes)} for what is moved there",
        hint=f"{KEY}=DIRECTORY on a larger disk, memory.segment_layers=2, or a smaller memory.host_fraction",
    )


def failed(directory: Path, error: Exception) -> EfflaunchError:
    """The error of a run whose disk stopped taking or giving data."""
    if isinstance(error, OSError) and error.errno in FULL:
        return ConfigError(
            f"{KEY}={directory}",
            found="no room left on the disk while activations were written",
            expected="the room that was free when the run started",
            hint=f"free some, or {KEY}=DIRECTORY on a disk that nothing else fills",
        )
    return EfflaunchError(f"{KEY}={directory}: {error}. The activations of this step are lost; the last checkpoint is not.")


class WriteMeter:
    """Measures how fast a directory really takes what is written; logs once if that is below what the plan rests on."""

    def __init__(
        self,
        expected_bytes_per_s: float | None,
        on_slow: Callable[[float, float], None],
        *,
        clock: Callable[[], float] = time.perf_counter,
        least_s: float = 2.0,
    ) -> None:
        """on_slow(measured, expected), in bytes/s, is called once, from the thread that finds out, after `least_s` of writing."""
        self._expected = expected_bytes_per_s
        self._on_slow = on_slow
        self._clock, self._least_s = clock, least_s
        self._lock = threading.Lock()
        self._active, self._since = 0, 0.0
        self.num_bytes, self.busy_s = 0, 0.0

    @property
    def bytes_per_s(self) -> float | None:
        """Over the time in which at least one write was under way; None before the first ended."""
        return self.num_bytes / self.busy_s if self.busy_s > 0 else None

    def __enter__(self) -> WriteMeter:
        with self._lock:
            if self._active == 0:
                self._since = self._clock()
            self._active += 1
        return self

    def __exit__(self, *_: object) -> None:
        with self._lock:
            now = self._clock()
            self.busy_s, self._since = self.busy_s + now - self._since, now
            self._active -= 1

    def wrote(self, num_bytes: int) -> None:
        """Call after the `with` block of a write that succeeded."""
        with self._lock:
            self.num_bytes += num_bytes
            measured, expected = self.bytes_per_s, self._expected
            is_slow = measured is not None and expected is not None and self.busy_s >= self._least_s and measured < expected
            if is_slow:
                self._expected = None
        if is_slow:
            assert measured is not None and expected is not None
            self._on_slow(measured, expected)


def warn_slow(directory: Path) -> Callable[[float, float], None]:
    """Log the warning."""

    def warn(measured: float, expected: float) -> None:
        log.warning(
            "%s=%s takes %s/s; the plan rests on %s/s. Steps wait for the disk. A faster disk, a smaller memory.host_fraction or "
            "memory.segment_layers=2 would help",
            KEY,
            directory,
            format_bytes(measured),
            format_bytes(expected),
        )

    return warn
