"""Writes Megatron's indexed corpus: resumable while it grows, under its final names only when it is whole."""

from __future__ import annotations

import fcntl
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from ...errors import DataError
from ...utils.atomic_files import sync, write_atomic
from .answers import Document
from .indexed import DTYPE_NAMES, HEADER, MAGIC, Kind, stored_dtype

FINAL_SUFFIXES = (".bin", ".mask.bin", ".scalars.bin", ".json", ".idx")
"""Suffixes in the order they appear: a reader starts from the .idx, so that one comes last."""
_LENGTHS = ".lengths.part"
_CHUNK = 1 << 20


@dataclass(frozen=True, slots=True)
class WriterState:
    """What is safely on disk; a writer resumed from it drops everything after."""

    documents: int = 0
    tokens: int = 0
    loss_tokens: int = 0
    has_mask: bool = False
    kind: str = Kind.DOCUMENTS.value


class IndexedWriter:
    """Appends documents to PREFIX.bin.part and friends; `finish` gives them their names."""

    def __init__(self, prefix: str, dtype: str, *, resume: WriterState | None = None) -> None:
        """`dtype` is one of `DTYPE_NAMES`. With `resume`, the parts are cut back to that state."""
        self.prefix, self.dtype = prefix, stored_dtype(dtype)
        self._code = next(code for code, name in DTYPE_NAMES.items() if name == dtype)
        self._max = int(np.iinfo(self.dtype).max)
        state = resume or WriterState()
        self.documents, self.tokens, self.loss_tokens = state.documents, state.tokens, state.loss_tokens
        self.kind = Kind(state.kind)
        Path(prefix).parent.mkdir(parents=True, exist_ok=True)
        self._bin = _open_part(_part(prefix, ".bin"), state.tokens * self.dtype.itemsize)
        self._lengths = _open_part(prefix + _LENGTHS, 4 * state.documents * self.items)
        self._scalars: BinaryIO | None = None
        if self.kind is Kind.COMPLETIONS:
            self._scalars = _open_part(_part(prefix, ".scalars.bin"), 16 * state.documents)
        else:
            Path(_part(prefix, ".scalars.bin")).unlink(missing_ok=True)
        self._mask: BinaryIO | None = _open_part(_part(prefix, ".mask.bin"), state.tokens) if state.has_mask else None
        if not state.has_mask:
            Path(_part(prefix, ".mask.bin")).unlink(missing_ok=True)

    @property
    def items(self) -> int:
        """Items of each document."""
        return 2 if self.kind is Kind.PAIRS else 1

    def add_document(self, document: Document) -> None:
        """Add a document of any kind; all documents of a corpus are of the kind of the first."""
        if self.documents == 0 and document.kind is not self.kind:
            self.kind = document.kind
            if self.kind is Kind.COMPLETIONS:
                self._scalars = _open_part(_part(self.prefix, ".scalars.bin"), 0)
        assert document.kind is self.kind, (document.kind, self.kind)
        if self._scalars is not None:
            self._scalars.write(np.array(document.scalars, dtype="<f8").tobytes())
        self.add(document.ids, document.mask, document.first)

    def add(self, token_ids: np.ndarray, mask: np.ndarray | None = None, first: int = 0) -> None:
        """Add a document and which of its tokens are training targets (None: all); `first`: tokens of a pair's first half."""
        if len(token_ids) >= 1 << 31:
            raise DataError(
                f"{self.prefix}: document {self.documents}",
                found=f"{len(token_ids):,} tokens",
                expected="fewer than 2,147,483,648 (the index stores 32-bit lengths)",
                hint="split this document before preparing it",
            )
        assert len(token_ids) == 0 or (int(token_ids.min()) >= 0 and int(token_ids.max()) <= self._max), "token id outside the dtype"
        if mask is not None and self._mask is None:
            self._mask = self._start_mask()
        if self._mask is not None:
            ones = np.ones(len(token_ids), dtype=np.uint8) if mask is None else mask.astype(np.uint8)
            assert len(ones) == len(token_ids), (len(ones), len(token_ids))
            self._mask.write(ones.tobytes())
        self._bin.write(token_ids.astype(self.dtype).tobytes())
        items = [first, len(token_ids) - first] if self.kind is Kind.PAIRS else [len(token_ids)]
        self._lengths.write(np.array(items, dtype="<i4").tobytes())
        self.documents += 1
        self.tokens += len(token_ids)
        self.loss_tokens += len(token_ids) if mask is None else int(np.count_nonzero(mask))

    def _start_mask(self) -> BinaryIO:
        # Documents before the first masked one are targets throughout.
        stream = _open_part(_part(self.prefix, ".mask.bin"), 0)
        for start in range(0, self.tokens, _CHUNK):
            stream.write(b"\x01" * min(_CHUNK, self.tokens - start))
        return stream

    def commit(self) -> WriterState:
        """Flush: everything added so far is on disk when this returns."""
        for stream in (self._bin, self._lengths, self._mask, self._scalars):
            if stream is not None:
                stream.flush()
                os.fsync(stream.fileno())
        return WriterState(self.documents, self.tokens, self.loss_tokens, self._mask is not None, self.kind.value)

    def seal(self, metadata: dict[str, Any] | None = None) -> None:
        """Write the index and `metadata` (as PREFIX.json), still under temporary names."""
        self.commit()
        with open(_part(self.prefix, ".idx"), "wb") as stream:
            stream.write(HEADER.pack(MAGIC, 1, self._code, self.documents * self.items, self.documents + 1))
            self._write_index(stream)
            stream.flush()
            os.fsync(stream.fileno())
        if metadata is not None:
            write_atomic(Path(_part(self.prefix, ".json")), (json.dumps(metadata, indent=1) + "\n").encode())

    def _write_index(self, stream: BinaryIO) -> None:
        lengths = _item_lengths(self.prefix, self.documents * self.items)
        stream.write(lengths.tobytes())
        at = 0
        for first in range(0, len(lengths), _CHUNK):
            ends = at + np.cumsum(lengths[first : first + _CHUNK], dtype=np.int64) * self.dtype.itemsize
            stream.write(np.concatenate(([at], ends[:-1])).astype("<i8").tobytes())
            at = int(ends[-1])
        for first in range(0, self.documents + 1, _CHUNK):
            boundaries = np.arange(first, min(first + _CHUNK, self.documents + 1), dtype="<i8") * self.items
            stream.write(boundaries.astype("<i8").tobytes())

    def finish(self, metadata: dict[str, Any] | None = None) -> None:
        """Seal and publish: afterwards the corpus is there, whole, under its names."""
        self.seal(metadata)
        publish(self.prefix)
        self.close()

    def close(self) -> None:
        """Let go of the parts, and of the lock that keeps a second writer away."""
        for stream in (self._bin, self._lengths, self._mask, self._scalars):
            if stream is not None:
                stream.close()


def publish(prefix: str) -> None:
    """Give sealed parts their final names. May be repeated after a stop in the middle of it."""
    for suffix in FINAL_SUFFIXES:
        part = _part(prefix, suffix)
        if os.path.exists(part):
            os.replace(part, prefix + suffix)
    Path(prefix + _LENGTHS).unlink(missing_ok=True)
    sync(Path(prefix).parent)


def discard(prefix: str) -> None:
    """Remove every temporary file of an unfinished corpus."""
    for name in (*(_part(prefix, suffix) for suffix in FINAL_SUFFIXES), prefix + _LENGTHS):
        Path(name).unlink(missing_ok=True)


def document_lengths(prefix: str, num_documents: int, items: int = 1) -> np.ndarray:
    """Tokens of the documents of `items` items each in an unfinished corpus whose parts are flushed."""
    lengths = _item_lengths(prefix, num_documents * items)
    return lengths if items == 1 else lengths.reshape(-1, items).sum(1, dtype=np.int64)


def _item_lengths(prefix: str, num_items: int) -> np.ndarray:
    if num_items == 0:
        return np.zeros(0, dtype="<i4")
    return np.memmap(prefix + _LENGTHS, dtype="<i4", mode="r", shape=(num_items,))


def _part(prefix: str, suffix: str) -> str:
    return prefix + suffix + ".part"


def _open_part(path: str, size: int) -> BinaryIO:
    stream = open(path, "ab")  # noqa: SIM115 (held open by the writer)
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        stream.close()
        actual = "another process writing it"
        raise DataError(
            f"unfinished corpus file {path}", found=actual, expected="one writer", hint="wait for it, or another --out"
        ) from error
    present = os.path.getsize(path)
    if present < size:
        stream.close()
        raise DataError(
            f"unfinished corpus file {path}",
            found=f"{present:,} bytes",
            expected=f"at least {size:,} bytes, as its state file says",
            hint="start again: add --restart",
        )
    stream.truncate(size)
    return stream
