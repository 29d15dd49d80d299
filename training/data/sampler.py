"""Which sequences a step trains on: a pure function of (seed, step) and the documents' lengths. Numpy only.

Note: pieces of long documents
    A document of L tokens has L - 1 targets: position t predicts token t + 1. A document over `max_seq_len` is cut
    into pieces [0, M), [M, 2M), ...; the last position of a piece predicts the first token of the next one, so
    no target is lost. A last piece of one token would have no target and is left out: its token is the target of
    the piece before it. Each piece is a sequence of its own, with positions from 0. A truncated document is its first piece.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from ...errors import ConfigError, DataError


@dataclass(frozen=True, slots=True)
class Sequence:
    """Tokens `start ... stop - 1` of one document of one corpus."""

    corpus: int
    document: int
    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True, slots=True)
class SequenceTable:
    """All training sequences as columns (one row per sequence), and what was left out."""

    corpus: np.ndarray
    document: np.ndarray
    start: np.ndarray
    stop: np.ndarray
    num_too_short: int
    """Documents of zero or one token: nothing to predict."""
    num_dropped: int
    """Documents over max_seq_len that were dropped."""
    num_truncated: int = 0
    """Those that were truncated."""

    @classmethod
    def from_lengths(cls, lengths: list[np.ndarray], *, max_seq_len: int, split: bool, truncate: bool = False) -> SequenceTable:
        """Rows for the documents of each corpus, in order; longer documents are split, or dropped, or else truncated."""
        if max_seq_len < 2:
            raise ConfigError("data.max_seq_len", found=str(max_seq_len), expected="at least 2 tokens", hint="data.max_seq_len=8K")
        most = max_seq_len if truncate else None
        parts = [_rows(np.asarray(corpus, dtype=np.int64), max_seq_len, split or truncate, most) for corpus in lengths]
        sizes = [len(part[0]) for part in parts]
        document, start, stop = (np.concatenate([part[column] for part in parts]) for column in range(3))
        return cls(
            corpus=np.repeat(np.arange(len(parts), dtype=np.int16), sizes),
            document=document,
            start=start,
            stop=stop,
            num_too_short=sum(int(np.count_nonzero(corpus < 2)) for corpus in lengths),
            num_dropped=0 if split or truncate else _num_longer(lengths, max_seq_len),
            num_truncated=_num_longer(lengths, max_seq_len) if truncate else 0,
        )

    def __len__(self) -> int:
        return len(self.document)

    @property
    def lengths(self) -> np.ndarray:
        """Tokens per sequence, int64."""
        return np.asarray(self.stop - self.start)

    def lengths_of(self, rows: np.ndarray) -> np.ndarray:
        """Tokens of the given rows, int64."""
        return np.asarray(self.stop[rows] - self.start[rows])

    def __getitem__(self, index: int) -> Sequence:
        row = (self.corpus[index], self.document[index], self.start[index], self.stop[index])
        return Sequence(*(int(value) for value in row))

    def without(self, rows: np.ndarray) -> SequenceTable:
        """The table less the given rows."""
        keep = np.ones(len(self), dtype=bool)
        keep[rows] = False
        return replace(self, corpus=self.corpus[keep], document=self.document[keep], start=self.start[keep], stop=self.stop[keep])


def _num_longer(lengths: list[np.ndarray], max_seq_len: int) -> int:
    return sum(int(np.count_nonzero(corpus > max_seq_len)) for corpus in lengths)


def _rows(lengths: np.ndarray, max_seq_len: int, split: bool, most: int | None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(document, start, stop) of each sequence; `most`: tokens of a document that count, None: all."""
    kept = np.flatnonzero((lengths >= 2) if split else ((lengths >= 2) & (lengths <= max_seq_len)))
    num_pieces = np.maximum(-(-(lengths[kept] - 1) // max_seq_len), 1)
    if most is not None:
        num_pieces, lengths = np.ones_like(num_pieces), np.minimum(lengths, most)
    document = np.repeat(kept, num_pieces)
    first_row = np.cumsum(num_pieces) - num_pieces
    piece = np.arange(len(document), dtype=np.int64) - np.repeat(first_row, num_pieces)
    start = piece * max_seq_len
    return document, start, np.minimum(start + max_seq_len, lengths[document])


class EpochStream:
    """The endless stream of shuffled epochs of some sequences: each holds each once, in an order that depends on (seed, epoch) alone."""

    def __init__(self, lengths: np.ndarray, seed: int) -> None:
        """`lengths` (N,) int64, tokens of each sequence; there is at least one."""
        self._lengths, self._seed = lengths, seed
        self.tokens = int(lengths.sum())
        """Tokens of one epoch."""
        self.longest = int(lengths.max())
        self._epochs: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    def between(self, low: int, high: int) -> np.ndarray:
        """Indices (int64) of the sequences that start in tokens `low ... high - 1` of the stream, in its order."""
        parts = [np.zeros(0, dtype=np.int64)]
        for epoch in range(low // self.tokens, (high - 1) // self.tokens + 1) if high > low else ():
            order, starts = self._epoch(epoch)
            base = epoch * self.tokens
            first, last = np.searchsorted(starts, (low - base, high - base))
            parts.append(order[first:last])
        return np.concatenate(parts).astype(np.int64)

    def start_from(self, position: int) -> int:
        """Tokens of the stream before the first sequence that starts at `position` or later."""
        epoch, inside = divmod(position, self.tokens)
        _, starts = self._epoch(epoch)
        index = int(np.searchsorted(starts, inside))
        return epoch * self.tokens + (int(starts[index]) if index < len(starts) else self.tokens)

    def _epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        if epoch not in self._epochs:
            order = shuffled(len(self._lengths), self._seed, epoch)
            lengths = self._lengths[order]
            starts = np.cumsum(lengths, dtype=np.int64)
            starts -= lengths
            # Two epochs are enough to walk over a border; more would cost 12 bytes per sequence each.
            self._epochs = {key: value for key, value in self._epochs.items() if key == epoch - 1}
            self._epochs[epoch] = (order, starts)
        return self._epochs[epoch]


class Sampler:
    """Cuts the endless stream of shuffled epochs into steps of `global_batch_tokens`.

    Every epoch holds every sequence once, in an order that depends on (seed, epoch) alone. Step s holds the sequences
    that start in tokens [s B, (s + 1) B) of the stream: B on average, never empty as B >= the longest sequence.
    """

    def __init__(self, table: SequenceTable, seed: int, global_batch_tokens: int) -> None:
        self.table, self.seed, self.batch_tokens = table, seed, global_batch_tokens
        if len(table) == 0:
            raise DataError("data", found="no sequence to train on", expected="documents of two tokens or more", hint="check data.prefixes")
        self._stream = EpochStream(table.lengths, seed)
        if global_batch_tokens < self._stream.longest:
            raise ConfigError(
                "data.global_batch_tokens",
                found=f"{global_batch_tokens}",
                expected=f"at least the longest sequence, {self._stream.longest} tokens",
                hint=f"data.global_batch_tokens={self._stream.longest}",
            )
        self.epoch_tokens = self._stream.tokens
        """Tokens of one epoch."""

    def epoch(self, step: int) -> float:
        """How many epochs are done before `step`."""
        return step * self.batch_tokens / self.epoch_tokens

    def step(self, step: int) -> np.ndarray:
        """Indices (int64) into the table of the sequences of a step, counted from 0, in stream order."""
        return self._stream.between(step * self.batch_tokens, (step + 1) * self.batch_tokens)


class InOrder:
    """Some rows of a table once, in order, cut into steps of at most `batch_tokens`; a longer sequence is a step of its own."""

    seed = 0

    def __init__(self, table: SequenceTable, rows: np.ndarray, batch_tokens: int) -> None:
        self.batch_tokens, self._rows = batch_tokens, rows
        lengths = table.lengths_of(rows)
        self.epoch_tokens = int(lengths.sum())
        cuts, num_tokens = [0], 0
        for index, length in enumerate(lengths.tolist()):
            if num_tokens and num_tokens + length > batch_tokens:
                cuts.append(index)
                num_tokens = 0
            num_tokens += length
        self._cuts = [*cuts, len(rows)] if len(rows) else [0]

    @property
    def num_steps(self) -> int:
        return len(self._cuts) - 1

    def step(self, step: int) -> np.ndarray:
        """Indices (int64) into the table of the sequences of a step, counted from 0."""
        return self._rows[self._cuts[step] : self._cuts[step + 1]]


def shuffled(size: int, seed: int, epoch: int) -> np.ndarray:
    """A permutation of `size` indices: sorted by a hash of (seed, epoch, index).

    Not numpy's generator: its streams may change between numpy versions, and a resumed run must see the same order.
    """
    key = _mix(_mix(np.uint64(seed % (1 << 64)).reshape(1)) ^ np.uint64(epoch))
    hashes = _mix(np.arange(size, dtype=np.uint64) ^ key)
    order = np.argsort(hashes)  # no ties, so any sort gives this order: each step of the hash is a bijection
    return order.astype(np.int32) if size < 1 << 31 else order


def _mix(value: np.ndarray) -> np.ndarray:
    """The splitmix64 finaliser on uint64 (wrapping): every input bit reaches every output bit."""
    value = value + np.uint64(0x9E3779B97F4A7C15)
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.asarray(value ^ (value >> np.uint64(31)))
