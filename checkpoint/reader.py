"""Tensors out of a checkpoint, every byte checked against its hash before it is used. Nothing is unpickled.

Files are read in the chunks their hashes are of, by a few threads, past the page cache where possible. A piece that lies
in memory as it lies in the file goes there directly; others (another sharding, dtype or device) pass through a buffer of
at most BATCH_BYTES, or of one piece where that is larger.
"""

from __future__ import annotations

import errno
import fcntl
import json
import math
import mmap
import os
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from . import files
from .archive import INDEX_FILE
from .manifest import Manifest, digest, file_damage
from .pool import copy_memory
from .sizes import BLOCK_BYTES

BATCH_BYTES = 256 << 20
THREADS = 3


class DamageError(Exception):
    """Bytes on disk are not those that were written; the text says where."""


@dataclass(frozen=True, slots=True)
class SavedPiece:
    """Part of a tensor in one file."""

    file: str
    begin: int
    """Where its numbers start in the file."""
    offsets: tuple[int, ...]
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class SavedTensor:
    """One tensor of a checkpoint."""

    size: torch.Size
    dtype: torch.dtype
    pieces: tuple[SavedPiece, ...]


@dataclass(slots=True)
class _Span:
    """Bytes of a file and where in memory they go."""

    file: str
    begin: int
    num_bytes: int
    target: int
    keep: Tensor
    """Owner of the target's memory."""


@dataclass(slots=True)
class _Job:
    """One chunk of one file, and the spans that want parts of it."""

    file: str
    chunk: int
    spans: list[_Span] = field(default_factory=list)


class Reader:
    """One committed directory. Errors: DamageError, OSError, ValueError, KeyError."""

    def __init__(self, path: Path, *, threads: int = THREADS) -> None:
        self.path, self.threads = path, threads
        self.commit = files.read_commit(path)
        self.bytes_read = 0
        self._manifests: dict[int, Manifest] = {}
        self.tensors = self._read_index()

    def read(self, targets: dict[str, Tensor]) -> None:
        """Fills each target (a DTensor: this rank's part of it) from its key, cast to its dtype. No communication."""
        for batch in _batches([(key, value) for key, value in targets.items() if local_part(value)[0].numel()]):
            spans: list[_Span] = []
            later: list[tuple[Tensor, Tensor]] = []
            for key, value in batch:
                self._plan(key, value, spans, later)
            self._run(spans)
            for target, source in later:
                target.copy_(source)

    def check(self, name: str) -> None:
        """DamageError where one of rank 0's files is not what was written."""
        damage = file_damage(self.path, self._manifest("__0_").file(name), self._manifest("__0_").chunk_bytes)
        if damage is not None:
            raise DamageError(damage)

    def _plan(self, key: str, value: Tensor, spans: list[_Span], later: list[tuple[Tensor, Tensor]]) -> None:
        saved = self.tensors[key]
        target, offsets = local_part(value)
        covered = 0
        for piece in saved.pieces:
            box = _overlap(piece.offsets, piece.shape, offsets, tuple(target.shape))
            if box is None:
                continue
            covered += math.prod(stop - start for start, stop in box)
            self._plan_piece(piece, box, saved.dtype, target, offsets, spans, later)
        if covered != target.numel():
            raise ValueError(f"{key}: only {covered} of {target.numel()} numbers are in the checkpoint")

    def _plan_piece(
        self,
        piece: SavedPiece,
        box: list[tuple[int, int]],
        dtype: torch.dtype,
        target: Tensor,
        offsets: tuple[int, ...],
        spans: list[_Span],
        later: list[tuple[Tensor, Tensor]],
    ) -> None:
        """`box`: the overlap, in coordinates of the whole tensor. Whole rows of the piece are read."""
        row_bytes = math.prod(piece.shape[1:]) * dtype.itemsize
        first = box[0][0] - piece.offsets[0] if box else 0
        rows = box[0][1] - box[0][0] if box else 1
        begin, num_bytes = piece.begin + first * row_bytes, rows * row_bytes
        place = target
        for dim, (start, stop) in enumerate(box):
            place = place.narrow(dim, start - offsets[dim], stop - start)
        whole_rows = all(start == at and stop - start == size for (start, stop), at, size in _inner(box, piece))
        if whole_rows and place.is_contiguous() and place.dtype == dtype and place.device.type == "cpu":
            spans.append(_Span(piece.file, begin, num_bytes, place.data_ptr(), place))
            return
        buffer = torch.empty((rows, *piece.shape[1:]) if box else (), dtype=dtype)
        spans.append(_Span(piece.file, begin, num_bytes, buffer.data_ptr(), buffer))
        source = buffer
        for dim, (start, stop) in list(enumerate(box))[1:]:
            source = source.narrow(dim, start - piece.offsets[dim], stop - start)
        later.append((place, source))

    def _run(self, spans: list[_Span]) -> None:
        jobs: dict[tuple[str, int], _Job] = {}
        for span in spans:
            size = self._manifest(span.file).chunk_bytes
            for chunk in range(span.begin // size, -(-(span.begin + span.num_bytes) // size)):
                jobs.setdefault((span.file, chunk), _Job(span.file, chunk)).spans.append(span)
        if not jobs:
            return
        by_file: dict[str, list[_Job]] = defaultdict(list)
        for _, job in sorted(jobs.items()):
            by_file[job.file].append(job)
        with ThreadPoolExecutor(self.threads) as threads:
            for name, work in by_file.items():
                with _OpenFile(self.path / name, self._manifest(name), self.threads) as file:
                    for length in threads.map(file.do, work):
                        self.bytes_read += length

    def _manifest(self, file: str) -> Manifest:
        rank = int(file.removeprefix("__").partition("_")[0])
        if rank not in self._manifests:
            self._manifests[rank] = files.read_manifest(self.path, self.commit, rank)
        return self._manifests[rank]

    def _read_index(self) -> dict[str, SavedTensor]:
        manifest = self._manifest("__0_")
        with _OpenFile(self.path / INDEX_FILE, manifest, 1) as file:
            content = json.loads(file.whole())
        return {key: _saved(entry) for key, entry in content["tensors"].items()}


def _saved(entry: dict[str, Any]) -> SavedTensor:
    dtype = getattr(torch, entry["dtype"])
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"no dtype {entry['dtype']}")
    pieces = tuple(SavedPiece(str(f), int(b), tuple(map(int, o)), tuple(map(int, s))) for f, b, o, s in entry["pieces"])
    return SavedTensor(torch.Size(entry["shape"]), dtype, pieces)


def _inner(box: list[tuple[int, int]], piece: SavedPiece) -> Iterator[tuple[tuple[int, int], int, int]]:
    return zip(box[1:], piece.offsets[1:], piece.shape[1:], strict=True)


def local_part(value: Tensor) -> tuple[Tensor, tuple[int, ...]]:
    """This rank's memory of a tensor and where it starts in the whole."""
    if not isinstance(value, DTensor):
        return value.detach(), (0,) * value.ndim
    _, offsets = compute_local_shape_and_global_offset(value.shape, value.device_mesh, value.placements)
    return value.to_local().detach(), tuple(offsets)


def _overlap(
    a_offsets: tuple[int, ...], a_shape: tuple[int, ...], b_offsets: tuple[int, ...], b_shape: tuple[int, ...]
) -> list[tuple[int, int]] | None:
    """(start, stop) per dim of what two boxes share; None where they share nothing."""
    box = []
    for a, a_size, b, b_size in zip(a_offsets, a_shape, b_offsets, b_shape, strict=True):
        start, stop = max(a, b), min(a + a_size, b + b_size)
        if start >= stop:
            return None
        box.append((start, stop))
    return box


def _batches(targets: list[tuple[str, Tensor]]) -> Iterator[list[tuple[str, Tensor]]]:
    batch: list[tuple[str, Tensor]] = []
    held = 0
    for key, value in targets:
        part, _ = local_part(value)
        size = part.numel() * part.element_size()
        if batch and held + size > BATCH_BYTES:
            yield batch
            batch, held = [], 0
        batch.append((key, value))
        held += size
    if batch:
        yield batch


class _OpenFile:
    """One file read by several threads, each chunk into an aligned buffer of its own."""

    def __init__(self, path: Path, manifest: Manifest, num_buffers: int) -> None:
        self.path, self.record, self.chunk_bytes = path, manifest.file(path.name), manifest.chunk_bytes
        self._descriptor, self._direct = _open(path, self.record.num_bytes)
        self._buffers: SimpleQueue[mmap.mmap] = SimpleQueue()
        for _ in range(num_buffers):
            self._buffers.put(mmap.mmap(-1, min(self.chunk_bytes, -(-max(1, self.record.num_bytes) // BLOCK_BYTES) * BLOCK_BYTES)))

    def __enter__(self) -> _OpenFile:
        return self

    def __exit__(self, *exc: object) -> None:
        os.close(self._descriptor)

    def whole(self) -> bytes:
        """For small files."""
        return b"".join(self._read(chunk, mmap.mmap(-1, self.chunk_bytes)) for chunk in range(len(self.record.chunks)))

    def do(self, job: _Job) -> int:
        """Bytes read."""
        buffer = self._buffers.get()
        try:
            data = self._read(job.chunk, buffer)
            base = torch.frombuffer(buffer, dtype=torch.uint8).data_ptr()
            start = job.chunk * self.chunk_bytes
            for span in job.spans:
                begin = max(span.begin, start)
                end = min(span.begin + span.num_bytes, start + len(data))
                copy_memory(span.target + begin - span.begin, base + begin - start, end - begin)
            return len(data)
        finally:
            self._buffers.put(buffer)

    def _read(self, chunk: int, buffer: mmap.mmap) -> memoryview:
        """The chunk's bytes, as they were written; DamageError otherwise."""
        offset = chunk * self.chunk_bytes
        length = min(self.chunk_bytes, self.record.num_bytes - offset)
        done = 0
        view = memoryview(buffer)
        while done < length:
            count = self._some(view[done:], offset + done)
            if count == 0:
                raise DamageError(f"{self.path.name} ends at byte {offset + done} of {self.record.num_bytes}")
            done += count
        if digest(view[:length]) != self.record.chunks[chunk]:
            raise DamageError(f"{self.path.name}: bytes {offset} to {offset + length} are not what was written")
        return view[:length]

    def _some(self, view: memoryview, offset: int) -> int:
        try:
            return os.preadv(self._descriptor, [view], offset)
        except OSError as error:
            if error.errno != errno.EINVAL or not self._direct:
                raise
        # A file system that takes the flag and refuses the read, or a short read that ended within a block.
        flags = fcntl.fcntl(self._descriptor, fcntl.F_GETFL)
        fcntl.fcntl(self._descriptor, fcntl.F_SETFL, flags & ~os.O_DIRECT)
        return os.preadv(self._descriptor, [view], offset)


def _open(path: Path, num_bytes: int) -> tuple[int, bool]:
    if num_bytes >= 1 << 20 and hasattr(os, "O_DIRECT"):
        try:
            return os.open(path, os.O_RDONLY | os.O_DIRECT), True
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
    return os.open(path, os.O_RDONLY), False
