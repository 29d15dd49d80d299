"""Plans where every tensor of a rank lies in its file, once: torch.distributed.checkpoint's format, made of memory copies.

Note: format. A `.distcp` file is a row of `torch.save` archives, one per tensor piece. The bytes around the numbers depend on
shape and dtype only, so they are made once, for an empty tensor, by torch itself (`skip_data` leaves a hole for the numbers);
a save then copies numbers into holes. Large pieces start at a block, small ones at 64 bytes. `.metadata` is torch's own
pickle; `index.json` says the same and is what we read: nothing of a checkpoint is ever unpickled by us.
The planner (who writes which piece; one copy of what is replicated) is torch's DefaultSavePlanner.
"""

from __future__ import annotations

import io
import json
import math
import pickle
import struct
import zipfile
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import CURRENT_DCP_VERSION, _StorageInfo
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, StorageMeta
from torch.distributed.checkpoint.planner import SavePlan
from torch.serialization import skip_data

from .sizes import BLOCK_BYTES, segment_bytes

METADATA_FILE, INDEX_FILE = ".metadata", "index.json"
_ALIGN = 64
_LARGE_BYTES = 1 << 20

Gather = Callable[[Any], list[Any]]
Scatter = Callable[[list[Any] | None], Any]


@dataclass(frozen=True, slots=True)
class Piece:
    """One tensor piece of this rank: an archive at `start`, its numbers at `data`."""

    key: str
    offsets: tuple[int, ...]
    """Offsets of the piece in the whole tensor."""
    shape: tuple[int, ...]
    dtype: torch.dtype
    start: int
    data: int
    num_bytes: int
    """Bytes of the numbers."""
    end: int
    head: bytes
    tail: bytes
    index: MetadataIndex


@dataclass(frozen=True, slots=True)
class Copy:
    """Bytes of one chunk: `text` itself, or `num_bytes` of a piece's numbers from byte `begin`."""

    at: int
    num_bytes: int
    piece: int = -1
    begin: int = 0
    text: bytes = b""


@dataclass(frozen=True)
class FileLayout:
    """What this rank writes at every save until the state changes its shape."""

    name: str
    num_bytes: int
    pieces: tuple[Piece, ...]
    chunks: tuple[tuple[Copy, ...], ...]
    """Chunks of `chunk_bytes` each, the last one shorter."""
    chunk_bytes: int
    total_bytes: int
    """Bytes of all ranks' files."""
    extra_files: tuple[tuple[str, bytes], ...]
    """`.metadata` and `index.json`, on rank 0."""


def fingerprint(tensors: dict[str, Tensor], sharding: Callable[[Tensor], Hashable]) -> int:
    """A hash of names, shapes, dtypes and sharding: the plan is made anew when it changes. Sources are looked up at every save."""
    return hash(tuple((key, tuple(value.shape), value.dtype, sharding(value)) for key, value in tensors.items()))


def plan_files(tensors: dict[str, Tensor], *, rank: int, largest_chunk: int, gather: Gather, scatter: Scatter) -> FileLayout:
    """The layout of this rank's file; collective (one gather and one scatter of plans). ValueError where pieces overlap."""
    planner = DefaultSavePlanner()
    planner.set_up_planner({key: value.detach() for key, value in tensors.items()}, StorageMeta(), rank == 0)
    plans: list[SavePlan] = gather(planner.create_local_plan())
    answers: list[Any] | None = None
    if rank == 0:
        final, metadata = planner.create_global_plan(plans)
        placed = [place(plan, other) for other, plan in enumerate(final)]
        total = sum(pieces[-1].end if pieces else 0 for pieces in placed)
        answers = [(plan, total) for plan in final]
        extra = ((METADATA_FILE, _metadata(metadata, placed)), (INDEX_FILE, _index(metadata, placed)))
    plan, total = scatter(answers)
    pieces = place(plan, rank)
    num_bytes = pieces[-1].end if pieces else 0
    chunk_bytes = segment_bytes(num_bytes, largest_chunk)
    chunks = cut(pieces, chunk_bytes)
    return FileLayout(
        file_name(rank),
        num_bytes,
        tuple(pieces),
        tuple(map(tuple, chunks)),
        chunk_bytes,
        total,
        extra if rank == 0 else (),
    )


def file_name(rank: int) -> str:
    return f"__{rank}_0.distcp"


def place(plan: SavePlan, rank: int) -> list[Piece]:
    """Offsets of every piece of a plan; the same on every rank that asks."""
    pieces: list[Piece] = []
    frames: dict[tuple[tuple[int, ...], torch.dtype], tuple[bytes, bytes]] = {}
    at = 0
    for item in plan.items:
        data = item.tensor_data
        assert data is not None, f"{item.index.fqn} is not a tensor"
        shape, dtype = tuple(data.chunk.sizes), data.properties.dtype
        if (shape, dtype) not in frames:
            frames[shape, dtype] = frame(shape, dtype)
        head, tail = frames[shape, dtype]
        num_bytes = math.prod(shape) * dtype.itemsize
        align = BLOCK_BYTES if num_bytes >= _LARGE_BYTES else _ALIGN
        begin = -(-(at + len(head)) // align) * align
        end = begin + num_bytes + len(tail)
        pieces.append(
            Piece(item.index.fqn, tuple(data.chunk.offsets), shape, dtype, begin - len(head), begin, num_bytes, end, head, tail, item.index)
        )
        at = end
    return pieces


def frame(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[bytes, bytes]:
    """What torch.save puts before and after the numbers of a contiguous tensor."""
    buffer = io.BytesIO()
    with skip_data():
        torch.save(torch.empty(shape, dtype=dtype), buffer)
    blob = buffer.getvalue()
    entry = next(info for info in zipfile.ZipFile(io.BytesIO(blob)).infolist() if info.filename.endswith("/data/0"))
    name_bytes, extra_bytes = struct.unpack_from("<HH", blob, entry.header_offset + 26)
    begin = entry.header_offset + 30 + name_bytes + extra_bytes
    assert entry.file_size == math.prod(shape) * dtype.itemsize and begin % _ALIGN == 0
    return blob[:begin], blob[begin + entry.file_size :]


def cut(pieces: Iterable[Piece], chunk_bytes: int) -> list[list[Copy]]:
    """The file as chunks of copies; gaps are zeros."""
    chunks: list[list[Copy]] = []

    def add(offset: int, num_bytes: int, piece: int, text: bytes) -> None:
        done = 0
        while done < num_bytes:
            chunk, at = divmod(offset + done, chunk_bytes)
            part = min(num_bytes - done, chunk_bytes - at)
            while len(chunks) <= chunk:
                chunks.append([])
            chunks[chunk].append(Copy(at, part, piece, done, text[done : done + part]))
            done += part

    end = 0
    for number, piece in enumerate(pieces):
        add(end, piece.start - end, -1, bytes(piece.start - end))
        add(piece.start, len(piece.head), -1, piece.head)
        add(piece.data, piece.num_bytes, number, b"")
        add(piece.data + piece.num_bytes, len(piece.tail), -1, piece.tail)
        end = piece.end
    return chunks


def _metadata(metadata: Metadata, placed: list[list[Piece]]) -> bytes:
    metadata.version = CURRENT_DCP_VERSION
    metadata.storage_meta = StorageMeta()
    metadata.storage_data = {
        piece.index: _StorageInfo(file_name(rank), piece.start, piece.end - piece.start)
        for rank, pieces in enumerate(placed)
        for piece in pieces
    }
    return pickle.dumps(metadata)


def _index(metadata: Metadata, placed: list[list[Piece]]) -> bytes:
    """The JSON twin of `.metadata`: what read_index and the reader go by."""
    tensors: dict[str, Any] = {}
    for rank, pieces in enumerate(placed):
        for piece in pieces:
            whole: Any = metadata.state_dict_metadata[piece.key]
            entry = tensors.setdefault(
                piece.key, {"dtype": str(piece.dtype).removeprefix("torch."), "shape": list(whole.size), "pieces": []}
            )
            entry["pieces"].append([file_name(rank), piece.data, list(piece.offsets), list(piece.shape)])
    return json.dumps({"tensors": tensors}).encode()
