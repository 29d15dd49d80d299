"""Megatron's indexed corpus: PREFIX.bin holds the tokens, PREFIX.idx says where each document lies.

The .idx file, little-endian: magic (9 bytes), version 1 (u64), dtype code (u8), number of items (u64), length of the
document list (u64); then item lengths (int32), item byte offsets (int64), and for each document the item it starts at,
with the number of items at the end (int64); then, in multimodal corpora only, one int8 mode per item.
A document is one or more items; items lie end to end in the .bin file.

Beside it there may be PREFIX.mask.bin, one uint8 per token in the same order (1: the token is a training target),
and PREFIX.json, what `efflaunch data prepare` wrote about it. Its "kind" says what the documents are:
    documents     text, prompt and completion, chats (also where there is no PREFIX.json)
    pairs         two items a document: the prompt with the chosen answer, the prompt with the rejected one
    completions   a prompt with one of its completions; PREFIX.scalars.bin holds (reward, advantage) per document, float64
"""

from __future__ import annotations

import json
import os
import struct
from dataclasses import dataclass
from enum import Enum
from typing import Any

import numpy as np

from ...errors import DataError


class Kind(Enum):
    """What the documents of a corpus are."""

    DOCUMENTS = "documents"
    PAIRS = "pairs"
    COMPLETIONS = "completions"


MAGIC = b"MMIDIDX\x00\x00"
HEADER = struct.Struct("<9sQBQQ")
DTYPE_NAMES = {1: "uint8", 2: "int8", 3: "int16", 4: "int32", 5: "int64", 6: "float64", 7: "float32", 8: "uint16"}
MAKE_HINT = "check data.prefixes, or make the corpus: efflaunch data prepare INPUT --tokenizer TOKENIZER --out PREFIX"


def dtype_for(vocab_size: int) -> str:
    """The token type Megatron takes for a vocabulary of this size."""
    return "uint16" if vocab_size < 65500 else "int32"


def stored_dtype(name: str) -> np.dtype[Any]:
    """The little-endian numpy type behind one of `DTYPE_NAMES`."""
    return np.dtype(name).newbyteorder("<")


@dataclass(frozen=True, slots=True)
class Index:
    """The content of a .idx file; `starts[d] ... starts[d + 1]` are document d's tokens, counted over the whole corpus."""

    dtype: np.dtype[Any]
    starts: np.ndarray
    items: np.ndarray
    """Where each item starts, and the end, counted the same way."""
    first_items: np.ndarray
    """The item each document starts at, and the end."""


def read_index(path: str) -> Index:
    """The checked content of a .idx file. DataError where it is missing, cut short or impossible."""
    size = _size(path)
    with open(path, "rb") as stream:
        head = stream.read(HEADER.size)
    if len(head) < HEADER.size:
        raise _damaged(path, f"{size} bytes", f"at least {HEADER.size} bytes of header")
    magic, version, code, num_items, num_boundaries = HEADER.unpack(head)
    if magic != MAGIC:
        raise _damaged(path, f"a file that starts with {bytes(magic)!r}", f"a Megatron index, which starts with {MAGIC!r}")
    if version != 1:
        raise _damaged(path, f"index version {version}", "version 1")
    if code not in DTYPE_NAMES or DTYPE_NAMES[code].startswith("float"):
        raise _damaged(path, f"token type code {code}", "an integer type: 1, 2, 3, 4, 5 or 8")
    expected = HEADER.size + 12 * num_items + 8 * num_boundaries
    if size not in (expected, expected + num_items):
        raise _damaged(path, f"{size:,} bytes", f"{expected:,} bytes for {num_items:,} items and {num_boundaries - 1:,} documents")
    dtype = stored_dtype(DTYPE_NAMES[code])
    return _checked_index(path, num_items, num_boundaries, dtype)


def _checked_index(path: str, num_items: int, num_boundaries: int, dtype: np.dtype[Any]) -> Index:
    raw = np.memmap(path, dtype=np.uint8, mode="r")
    at = HEADER.size
    lengths = raw[at : at + 4 * num_items].view("<i4")
    pointers = raw[at + 4 * num_items : at + 12 * num_items].view("<i8")
    boundaries = np.asarray(raw[at + 12 * num_items : at + 12 * num_items + 8 * num_boundaries].view("<i8"))
    if num_items and int(lengths.min()) < 0:
        raise _damaged(path, "a negative item length", "lengths of zero or more")
    offsets = np.zeros(num_items + 1, dtype=np.int64)
    np.cumsum(lengths, out=offsets[1:])
    if not np.array_equal(pointers, offsets[:-1] * dtype.itemsize):
        raise _damaged(path, "items that do not lie end to end", "each item to start where the one before it stops")
    ordered = bool(np.all(boundaries[1:] >= boundaries[:-1]))
    if num_boundaries < 1 or boundaries[0] != 0 or boundaries[-1] != num_items or not ordered:
        raise _damaged(path, "a document list that does not cover the items in order", f"one from 0 to {num_items:,}")
    return Index(dtype, np.asarray(offsets[boundaries]), offsets, boundaries)


class IndexedCorpus:
    """Documents of one corpus, read from memory maps: only the pages that are asked for are touched."""

    def __init__(self, prefix: str, *, learns_all: bool = False, joined: bool = False) -> None:
        """Raise DataError if a file is missing, cut short or does not belong to the others.

        `learns_all`: every token is a training target, whatever the loss mask says. `joined`: all documents, as they lie, are one.
        """
        self.prefix, self.learns_all = _checked_prefix(prefix), learns_all
        index = read_index(self.prefix + ".idx")
        self._starts = index.starts
        self.lengths: np.ndarray = np.diff(index.starts)
        """Tokens per document, int64."""
        self.stored_lengths = self.lengths
        """Of the documents in the files, joined or not."""
        if self.num_tokens == 0:
            raise _damaged(self.prefix + ".idx", "no tokens", "at least one document")
        self._tokens = _open_array(self.prefix + ".bin", index.dtype, self.num_tokens)
        self.metadata = read_metadata(self.prefix)
        """Content of PREFIX.json, or None where the corpus was made by something else."""
        self._mask = self._open_mask()
        self.kind = Kind((self.metadata or {}).get("kind", Kind.DOCUMENTS.value))
        self._first_parts = self._open_pairs(index) if self.kind is Kind.PAIRS else None
        self._scalars = self._open_scalars() if self.kind is Kind.COMPLETIONS else None
        if joined and self.kind is Kind.DOCUMENTS:
            # Documents lie end to end in the file.
            self._starts = self._starts[[0, -1]]
            self.lengths = np.diff(self._starts)

    @property
    def num_documents(self) -> int:
        return len(self.lengths)

    @property
    def num_tokens(self) -> int:
        return int(self._starts[-1])

    @property
    def has_mask(self) -> bool:
        """Whether a loss mask says what the targets are."""
        return self._mask is not None and not self.learns_all

    def parts(self, document: int) -> tuple[int, ...]:
        """Tokens of the chosen and of the rejected half of a pair, each with its prompt; nothing for other documents."""
        if self._first_parts is None:
            return ()
        first = int(self._first_parts[document])
        return first, int(self.lengths[document]) - first

    def columns(self) -> dict[str, np.ndarray | None]:
        """The numbers of the whole corpus as they are stored: tokens, loss mask, rewards and advantages; None: it has none."""
        return {"tokens": self._tokens, "mask": self._mask, "scalars": self._scalars}

    def advantage(self, document: int) -> float:
        """How much better than its group a completion was rewarded."""
        assert self._scalars is not None, f"{self.prefix} holds {self.kind.value}"
        return float(self._scalars[2 * document + 1])

    def tokens(self, document: int, start: int, stop: int) -> np.ndarray:
        """Tokens `start ... stop - 1` of a document, int64."""
        return np.asarray(self._tokens[self.span(document, start, stop)]).astype(np.int64)

    def mask(self, document: int, start: int, stop: int) -> np.ndarray | None:
        """The loss mask of the same tokens: bool, True where the token is a training target; None where everything is."""
        if self._mask is None or self.learns_all:
            return None
        return np.asarray(np.asarray(self._mask[self.span(document, start, stop)]) != 0)

    def span(self, document: int, start: int, stop: int) -> slice:
        """The same tokens as a span over the whole corpus."""
        assert 0 <= start <= stop <= int(self.lengths[document]), (self.prefix, document, start, stop)
        begin = int(self._starts[document])
        return slice(begin + start, begin + stop)

    def _open_pairs(self, index: Index) -> np.ndarray:
        if not np.array_equal(index.first_items, np.arange(0, 2 * self.num_documents + 1, 2)):
            raise _damaged(self.prefix + ".idx", "documents that are not two items each", f"the pairs that {self.prefix}.json speaks of")
        return np.asarray(np.diff(index.items)[::2])

    def _open_scalars(self) -> np.ndarray:
        return open_companion(
            self.prefix + ".scalars.bin", np.dtype("<f8"), 2 * self.num_documents, "reward and advantage of each document"
        )

    def _open_mask(self) -> np.ndarray | None:
        path = self.prefix + ".mask.bin"
        if os.path.exists(path):
            return _open_array(path, np.dtype(np.uint8), self.num_tokens)
        if self.metadata is not None and self.metadata.get("loss_mask"):
            raise _damaged(path, "no file", f"the loss mask that {self.prefix}.json speaks of")
        return None


def read_metadata(prefix: str) -> dict[str, Any] | None:
    """Content of PREFIX.json; None where there is none."""
    path = prefix + ".json"
    if not os.path.exists(path):
        return None
    try:
        with open(path, encoding="utf-8") as stream:
            content = json.load(stream)
    except (ValueError, RecursionError) as error:
        raise _damaged(path, f"a file that is not JSON ({error})", "what efflaunch data prepare wrote") from error
    except OSError as error:
        raise _damaged(path, str(error.strerror), "a file that can be read") from error
    if not isinstance(content, dict):
        # Not ours: a corpus made by something else.
        return None
    _check_metadata(path, content)
    return content


def _check_metadata(path: str, content: dict[str, Any]) -> None:
    """Raise DataError where what is read of PREFIX.json later on is of another type."""
    kinds = [kind.value for kind in Kind]
    if content.get("kind", kinds[0]) not in kinds:
        raise _damaged(path, f"the kind {content['kind']!r}"[:200], f"one of {', '.join(kinds)}")
    if not isinstance(content.get("loss_mask", False), bool):
        raise _damaged(path, f"the loss_mask {content['loss_mask']!r}"[:200], "true or false")
    tokenizer = content.get("tokenizer")
    if tokenizer is None:
        return
    size = tokenizer.get("vocab_size", 0) if isinstance(tokenizer, dict) else None
    if not isinstance(size, int) or isinstance(size, bool) or not 0 <= size < 1 << 40:
        raise _damaged(path, f"the tokenizer {tokenizer!r}"[:200], "its path, vocab_size and vocab_sha256")


def _checked_prefix(prefix: str) -> str:
    for suffix in (".bin", ".idx"):
        if prefix.endswith(suffix) and os.path.exists(prefix):
            short = prefix[: -len(suffix)]
            raise DataError(f"corpus {prefix}", found="a file name", expected="the prefix of the pair", hint=f"data.prefixes=[{short}]")
    return prefix


def _size(path: str) -> int:
    if not os.path.exists(path):
        raise _damaged(path, "no file", "a Megatron indexed corpus (PREFIX.idx and PREFIX.bin)")
    if not os.path.isfile(path):
        raise _damaged(path, "no plain file", "a Megatron indexed corpus (PREFIX.idx and PREFIX.bin)")
    size = os.path.getsize(path)
    if size == 0:
        raise _damaged(path, "an empty file", "a Megatron indexed corpus")
    return size


def _open_array(path: str, dtype: np.dtype[Any], num_tokens: int) -> np.ndarray:
    size, expected = _size(path), num_tokens * dtype.itemsize
    if size != expected:
        kind = "cut short" if size < expected else "too long"
        raise _damaged(path, f"{size:,} bytes ({kind})", f"{expected:,} bytes: {num_tokens:,} tokens of {dtype.itemsize} as the .idx says")
    return np.memmap(path, dtype=dtype, mode="r")


def open_companion(path: str, dtype: np.dtype[Any], length: int, meaning: str, hint: str = MAKE_HINT) -> np.ndarray:
    """Numbers beside a corpus, memory-mapped; DataError where there are not exactly `length`."""
    size, expected = _size(path), length * dtype.itemsize
    if size != expected:
        raise DataError(
            f"corpus file {path}",
            found=f"{size:,} bytes",
            expected=f"{expected:,} bytes: {meaning}, {length:,} numbers of {dtype.itemsize} bytes",
            hint=hint,
        )
    return np.memmap(path, dtype=dtype, mode="r")


def _damaged(path: str, actual: str, expected: str) -> DataError:
    return DataError(f"corpus file {path}", found=actual, expected=expected, hint=MAKE_HINT)
