"""Defines where a checkpoint's bytes are read from: a directory, or memory (replica/source.py). Readers check hashes."""

from __future__ import annotations

import errno
import fcntl
import os
from pathlib import Path
from typing import Any, Protocol

from . import files
from .manifest import Manifest

_LEAST_DIRECT_BYTES = 1 << 20


class OpenFile(Protocol):
    """One file, read by several threads."""

    @property
    def num_copies(self) -> int:
        """Number of places that should hold the same bytes; 0 is asked first."""
        ...

    def read_into(self, view: memoryview, offset: int, copy: int) -> int:
        """Read into a buffer; returns bytes read, 0 at the end. OSError as it comes."""
        ...

    def close(self) -> None: ...


class Source(Protocol):
    """One checkpoint."""

    @property
    def name(self) -> str:
        """Name of the source in messages."""
        ...

    @property
    def commit(self) -> dict[str, Any]:
        """The commit record: at least `step`, `attempt`, `world_size`, and `manifests` (file name to hash)."""
        ...

    def manifest(self, rank: int) -> Manifest:
        """A manifest, checked against `commit`; ValueError, KeyError or OSError otherwise."""
        ...

    def open(self, name: str, num_bytes: int) -> OpenFile: ...


class DirectorySource:
    """A committed directory, read past the page cache where the file system allows it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._commit = files.read_commit(path)

    @property
    def name(self) -> str:
        return str(self.path)

    @property
    def commit(self) -> dict[str, Any]:
        return self._commit

    def manifest(self, rank: int) -> Manifest:
        return files.read_manifest(self.path, self._commit, rank)

    def open(self, name: str, num_bytes: int) -> OpenFile:
        return _DirectFile(self.path / name, num_bytes)


class _DirectFile:
    num_copies = 1

    def __init__(self, path: Path, num_bytes: int) -> None:
        self._direct = num_bytes >= _LEAST_DIRECT_BYTES and hasattr(os, "O_DIRECT")
        self._descriptor = self._open(path)

    def _open(self, path: Path) -> int:
        if self._direct:
            try:
                return os.open(path, os.O_RDONLY | os.O_DIRECT)
            except OSError as error:
                if error.errno != errno.EINVAL:
                    raise
                self._direct = False
        return os.open(path, os.O_RDONLY)

    def read_into(self, view: memoryview, offset: int, copy: int) -> int:
        try:
            return os.preadv(self._descriptor, [view], offset)
        except OSError as error:
            if error.errno != errno.EINVAL or not self._direct:
                raise
        # A file system that takes the flag and refuses the read, or a short read that ended within a block.
        flags = fcntl.fcntl(self._descriptor, fcntl.F_GETFL)
        fcntl.fcntl(self._descriptor, fcntl.F_SETFL, flags & ~os.O_DIRECT)
        return os.preadv(self._descriptor, [view], offset)

    def close(self) -> None:
        os.close(self._descriptor)
