"""Describes in `rank-R.json` what one rank wrote, with a hash of every chunk. No torch: flushers and listings read it.

Hashes are xxh3 with 64 bits: they find damage (one flipped bit in 2^64 pairs of chunks slips through), not forgery.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import xxhash

from ..utils.names import is_file_name

Buffer = bytes | bytearray | memoryview


def digest(data: Buffer) -> str:
    """xxh3 of the bytes, 16 hexadecimal digits; other threads run meanwhile."""
    return str(xxhash.xxh3_64_hexdigest(data))


@dataclass(frozen=True, slots=True)
class FileRecord:
    """One file of a rank."""

    name: str
    num_bytes: int
    chunks: tuple[str, ...]
    """Hash of each `chunk_bytes` of it, the last one shorter."""


@dataclass(frozen=True, slots=True)
class Manifest:
    """Everything one rank wrote in one attempt."""

    step: int
    attempt: str
    """Identity of an attempt of one process group: files of another attempt never pass for this one's."""
    rank: int
    world_size: int
    chunk_bytes: int
    files: tuple[FileRecord, ...]

    def to_bytes(self) -> bytes:
        return (json.dumps(asdict(self), indent=1) + "\n").encode()

    @classmethod
    def from_bytes(cls, data: bytes) -> Manifest:
        """Parse a manifest; ValueError, KeyError or TypeError where the bytes are none."""
        fields: dict[str, Any] = json.loads(data)
        files = tuple(FileRecord(str(f["name"]), int(f["num_bytes"]), tuple(map(str, f["chunks"]))) for f in fields.pop("files"))
        for file in files:
            check_file_name(file.name)
        return cls(**fields, files=files)

    def file(self, name: str) -> FileRecord:
        """The record of a file; KeyError where this rank wrote no such file."""
        for record in self.files:
            if record.name == name:
                return record
        raise KeyError(name)


def check_file_name(name: str) -> None:
    """Raise ValueError for a name that leads out of its folder."""
    if not is_file_name(name):
        raise ValueError(f"{name!r} is no name of a file in a checkpoint")


def manifest_name(rank: int) -> str:
    return f"rank-{rank}.json"


def chunk_spans(num_bytes: int, chunk_bytes: int) -> Iterator[tuple[int, int]]:
    """Offset and length of each chunk."""
    for offset in range(0, num_bytes, chunk_bytes):
        yield offset, min(chunk_bytes, num_bytes - offset)


def file_damage(folder: Path, record: FileRecord, chunk_bytes: int) -> str | None:
    """Read a whole file and return what is wrong; None: every chunk has its hash. OSError where it cannot be read."""
    with (folder / record.name).open("rb") as file:
        for index, (offset, length) in enumerate(chunk_spans(record.num_bytes, chunk_bytes)):
            data = file.read(length)
            if len(data) != length:
                return f"{record.name} ends at byte {offset + len(data)} of {record.num_bytes}"
            if digest(data) != record.chunks[index]:
                return f"{record.name}: bytes {offset} to {offset + length} are not what was written"
    return None
