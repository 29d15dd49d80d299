"""Reads tensors out of a checkpoint, every byte checked against its hash before it is used. Nothing is unpickled.

Files are read in the chunks their hashes are of, by a few threads. A piece that lies in memory as it lies in the file goes
there directly; others (another sharding, dtype or device) wait in buffers of BATCH_BYTES and one tensor more at most.
"""

from __future__ import annotations

import json
import logging
import math
import mmap
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import torch
from torch import Tensor

from .archive import INDEX_FILE
from .flat import Piece
from .manifest import Manifest, digest
from .pool import copy_memory
from .progress import RestoreProgress
from .sizes import BLOCK_BYTES
from .source import DirectorySource, Source

log = logging.getLogger(__name__)
BATCH_BYTES = 256 << 20
THREADS = 3


Pieces = Callable[[Tensor], list[Piece]]
"""Maps a tensor to this rank's memory of it, piece by piece, and where each starts in the whole."""


def whole(value: Tensor) -> list[Piece]:
    """The `Pieces` of a tensor that nobody shards: all of it. TypeError for one that is of a kind of its own, which may be sharded."""
    if type(value) not in (Tensor, torch.nn.Parameter):
        raise TypeError(f"a {type(value).__name__} may be a part of a tensor: say by `pieces` which")
    return [(value.detach(), (0,) * value.ndim)]


class DamageError(Exception):
    """Bytes on disk are not those that were written; the text says where."""


@dataclass(frozen=True, slots=True)
class SavedPiece:
    """Part of a tensor in one file."""

    file: str
    begin: int
    """First byte of its numbers in the file."""
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
    """One checkpoint: a committed directory, or another source. Errors: DamageError, OSError, ValueError, KeyError."""

    def __init__(self, place: Path | Source, *, threads: int = THREADS, progress: RestoreProgress | None = None) -> None:
        self.progress = progress or RestoreProgress()
        self.source: Source = DirectorySource(place) if isinstance(place, Path) else place
        self.threads = threads
        self._manifests: dict[int, Manifest] = {}
        self.tensors = self._read_index()

    def read(self, targets: dict[str, Tensor], pieces: Pieces = whole) -> None:
        """Fill this rank's `pieces` of each target from its key, cast to its dtype. No communication."""
        spans: list[_Span] = []
        later: list[tuple[Tensor, Tensor]] = []
        waiting = 0
        parts = [(key, *piece) for key, value in targets.items() for piece in pieces(value)]
        self.progress.begin(f"reading {self.source.name}", sum(own.numel() * own.element_size() for _, own, _ in parts))
        with _Files(self) as opened:
            for key, own, offsets in parts:
                begin = len(later)
                if own.numel():
                    self._plan(key, own, offsets, spans, later)
                waiting += sum(source.numel() * source.element_size() for _, source in later[begin:])
                if waiting > BATCH_BYTES:
                    self._run(spans, later, opened)
                    waiting = 0
            self._run(spans, later, opened)

    def small(self, name: str) -> bytes:
        """Read one of rank 0's files; DamageError where it is not what was written."""
        with _Files(self) as opened:
            return opened.file(name, 0).whole()

    def _run(self, spans: list[_Span], later: list[tuple[Tensor, Tensor]], opened: _Files) -> None:
        """Reads what is planned so far, and empties the plan."""
        jobs: dict[tuple[str, int], _Job] = {}
        for span in spans:
            size = self.manifest(rank_of(span.file)).chunk_bytes
            for chunk in range(span.begin // size, -(-(span.begin + span.num_bytes) // size)):
                jobs.setdefault((span.file, chunk), _Job(span.file, chunk)).spans.append(span)
        for length in opened.threads.map(opened.do, [job for _, job in sorted(jobs.items())]):
            self.progress.add(length)
        for target, source in later:
            target.copy_(source)
        spans.clear()
        later.clear()

    def manifest(self, rank: int) -> Manifest:
        """The manifest of what the rank wrote."""
        if rank not in self._manifests:
            self._manifests[rank] = self.source.manifest(rank)
        return self._manifests[rank]

    def _read_index(self) -> dict[str, SavedTensor]:
        return {key: _saved(entry) for key, entry in json.loads(self.small(INDEX_FILE))["tensors"].items()}

    def _plan(self, key: str, target: Tensor, offsets: tuple[int, ...], spans: list[_Span], later: list[tuple[Tensor, Tensor]]) -> None:
        saved = self.tensors[key]
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
        """Plan a piece; `box`: the overlap, in coordinates of the whole tensor. Whole rows of the piece are read."""
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


def _saved(entry: dict[str, Any]) -> SavedTensor:
    dtype = getattr(torch, entry["dtype"])
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"no dtype {entry['dtype']}")
    pieces = tuple(SavedPiece(str(f), int(b), tuple(map(int, o)), tuple(map(int, s))) for f, b, o, s in entry["pieces"])
    return SavedTensor(torch.Size(entry["shape"]), dtype, pieces)


def _inner(box: list[tuple[int, int]], piece: SavedPiece) -> Iterator[tuple[tuple[int, int], int, int]]:
    return zip(box[1:], piece.offsets[1:], piece.shape[1:], strict=True)


def _overlap(
    a_offsets: tuple[int, ...], a_shape: tuple[int, ...], b_offsets: tuple[int, ...], b_shape: tuple[int, ...]
) -> list[tuple[int, int]] | None:
    """The intersection of two boxes, (start, stop) per dim; None where they share nothing."""
    box = []
    for a, a_size, b, b_size in zip(a_offsets, a_shape, b_offsets, b_shape, strict=True):
        start, stop = max(a, b), min(a + a_size, b + b_size)
        if start >= stop:
            return None
        box.append((start, stop))
    return box


class _Files:
    """The files of one read, each opened once; threads, and an aligned buffer for each."""

    def __init__(self, reader: Reader) -> None:
        self._reader = reader
        self.threads = ThreadPoolExecutor(reader.threads)
        self._open: dict[str, _CheckedFile] = {}
        self._buffers: SimpleQueue[mmap.mmap | None] = SimpleQueue()
        for _ in range(reader.threads):
            self._buffers.put(None)
        self._lock = threading.Lock()

    def __enter__(self) -> _Files:
        return self

    def __exit__(self, *exc: object) -> None:
        self.threads.shutdown(cancel_futures=True)
        for file in self._open.values():
            file.opened.close()

    def file(self, name: str, rank: int) -> _CheckedFile:
        with self._lock:
            if name not in self._open:
                self._open[name] = _CheckedFile(self._reader.source, name, self._reader.manifest(rank))
            return self._open[name]

    def do(self, job: _Job) -> int:
        """Run a job; returns bytes read."""
        file = self.file(job.file, rank_of(job.file))
        buffer = self._buffers.get()
        try:
            if buffer is None or len(buffer) < file.chunk_bytes:
                buffer = mmap.mmap(-1, -(-file.chunk_bytes // BLOCK_BYTES) * BLOCK_BYTES)
            data = file.read(job.chunk, buffer)
            base = torch.frombuffer(buffer, dtype=torch.uint8).data_ptr()
            start = job.chunk * file.chunk_bytes
            for span in job.spans:
                begin = max(span.begin, start)
                end = min(span.begin + span.num_bytes, start + len(data))
                copy_memory(span.target + begin - span.begin, base + begin - start, end - begin)
            return len(data)
        finally:
            self._buffers.put(buffer)


def rank_of(file: str) -> int:
    """The rank that wrote a file of tensors."""
    return int(file.removeprefix("__").partition("_")[0])


class _CheckedFile:
    """Chunks of one file, each compared with its hash; of another copy where one is damaged and there are several."""

    def __init__(self, source: Source, name: str, manifest: Manifest) -> None:
        self.name, self.record, self.chunk_bytes = name, manifest.file(name), manifest.chunk_bytes
        self.opened = source.open(name, self.record.num_bytes)

    def whole(self) -> bytes:
        """Read a whole small file."""
        size = -(-min(self.chunk_bytes, max(1, self.record.num_bytes)) // BLOCK_BYTES) * BLOCK_BYTES
        return b"".join(self.read(chunk, mmap.mmap(-1, size)) for chunk in range(len(self.record.chunks)))

    def read(self, chunk: int, buffer: mmap.mmap) -> memoryview:
        """The chunk's bytes, as they were written; DamageError otherwise."""
        last = self.opened.num_copies - 1
        for copy in range(last):
            try:
                return self._read(chunk, buffer, copy)
            except (OSError, DamageError) as error:
                log.warning("%s, from another copy then", error)
        return self._read(chunk, buffer, last)

    def _read(self, chunk: int, buffer: mmap.mmap, copy: int) -> memoryview:
        offset = chunk * self.chunk_bytes
        length = min(self.chunk_bytes, self.record.num_bytes - offset)
        # Direct reads end at a block.
        view = memoryview(buffer)[: -(-length // BLOCK_BYTES) * BLOCK_BYTES]
        done = 0
        while done < length:
            count = self.opened.read_into(view[done:], offset + done, copy)
            if count == 0:
                raise DamageError(f"{self.name} ends at byte {offset + done} of {self.record.num_bytes}")
            done += count
        if digest(view[:length]) != self.record.chunks[chunk]:
            raise DamageError(f"{self.name}: bytes {offset} to {offset + length} are not what was written")
        return view[:length]
