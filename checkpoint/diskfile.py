"""Writes one file front to back: past the page cache where the file system allows it, through it and fsynced elsewhere."""

from __future__ import annotations

import ctypes
import errno
import os
from pathlib import Path

from .sizes import BLOCK_BYTES

DIRECT, BUFFERED = "direct", "buffered"
_MIN_DIRECT_BYTES = 1 << 20


class DiskFile:
    """A new file of a known size, its space reserved: a full disk shows before anything is written. OSError as it comes."""

    def __init__(self, path: Path, num_bytes: int) -> None:
        self.path, self.num_bytes = path, num_bytes
        self.mode = DIRECT if num_bytes >= _MIN_DIRECT_BYTES else BUFFERED
        self.descriptor = -1
        flags = os.O_CREAT | os.O_WRONLY | os.O_EXCL
        if self.mode == DIRECT:
            try:
                self.descriptor = os.open(path, flags | getattr(os, "O_DIRECT", 0), 0o644)
            except OSError as error:
                if error.errno != errno.EINVAL:
                    raise
                self.mode = BUFFERED
                path.unlink(missing_ok=True)
        if self.descriptor < 0:
            self.descriptor = os.open(path, flags, 0o644)
        try:
            _reserve(self.descriptor, num_bytes)
        except OSError:
            self.close()
            raise

    def write(self, offset: int, data: memoryview, padded: memoryview) -> None:
        """Write all of `data` at `offset`; direct writes write whole blocks (`padded`), and finish() cuts the rest off."""
        if self.mode == DIRECT:
            try:
                _write_all(self.descriptor, padded, offset, align=BLOCK_BYTES)
                return
            except OSError as error:
                if error.errno != errno.EINVAL:
                    raise
                # Some file systems take the flag and refuse the write.
                self._go_buffered()
        _write_all(self.descriptor, data, offset)

    def _go_buffered(self) -> None:
        import fcntl

        self.mode = BUFFERED
        flags = fcntl.fcntl(self.descriptor, fcntl.F_GETFL)
        fcntl.fcntl(self.descriptor, fcntl.F_SETFL, flags & ~getattr(os, "O_DIRECT", 0))

    def finish(self) -> None:
        """Make the file durable and of its size. After a failed fsync nothing of it may be trusted: the attempt is given up."""
        os.ftruncate(self.descriptor, self.num_bytes)
        os.fsync(self.descriptor)

    def close(self) -> None:
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1


def _write_all(descriptor: int, data: memoryview, offset: int, align: int = 1) -> None:
    """Write on after short writes, from the last `align`-ed byte that was taken."""
    done = 0
    while done < len(data):
        count = os.pwrite(descriptor, data[done:], offset + done)
        count -= count % align
        if count == 0:
            raise OSError(errno.EIO, "a write of nothing")
        done += count


def _reserve(descriptor: int, num_bytes: int) -> None:
    """Reserve space by fallocate: the C library's posix_fallocate writes every block where a file system cannot reserve."""
    libc = ctypes.CDLL(None, use_errno=True)
    if num_bytes == 0 or not hasattr(libc, "fallocate"):
        return
    if libc.fallocate(descriptor, 0, ctypes.c_int64(0), ctypes.c_int64(num_bytes)):
        number = ctypes.get_errno()
        if number not in (errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL):
            raise OSError(number, os.strerror(number))
