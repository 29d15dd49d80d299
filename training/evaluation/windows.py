"""Chooses what an evaluation reads: windows over documents, and which of their positions count. Pure; numpy only.

Note: passes. An evaluation goes over a corpus several times, in windows of tokens of one document that attend to nothing outside:
    whole    documents, those over `data.max_seq_len` cut as training cuts them; every target counts
    short    for targets with more than `eval.context_tokens` before them in `whole`: the same ones, with between half of that and
             all of it; what they lose is what the rest of the context was worth
    L        one pass for each of `eval.lengths`: a window of L tokens that ends where those of the other lengths do. What counts
             are the targets of its last positions, half of the shortest length: the same ones in each pass, with more before them
Each window of a pass is a sequence of its own, with positions from 0.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..data.sampler import shuffled

WHOLE, SHORT = "whole", "short"


@dataclass(frozen=True, slots=True)
class Windows:
    """Windows [start, stop) of documents as columns, int64; targets of positions `first ... stop - 1` count."""

    document: np.ndarray
    start: np.ndarray
    stop: np.ndarray
    first: np.ndarray

    def __len__(self) -> int:
        return len(self.document)

    @property
    def num_tokens(self) -> int:
        """Tokens the model reads."""
        return int((self.stop - self.start).sum())

    def num_targets(self, lengths: np.ndarray) -> int:
        """Targets that count, with no loss mask; `lengths` of the corpus's documents. The last token of a document predicts nothing."""
        last = np.minimum(self.stop, lengths[self.document] - 1)
        return int(np.maximum(last - self.first, 0).sum())

    def take(self, rows: np.ndarray) -> Windows:
        """The given rows."""
        return Windows(self.document[rows], self.start[rows], self.stop[rows], self.first[rows])


def whole_windows(lengths: np.ndarray, max_seq_len: int, max_tokens: int | None) -> Windows:
    """Documents of `lengths`, cut at `max_seq_len` as training cuts them (data/sampler.py), as many as `max_tokens` has room for."""
    kept = np.flatnonzero(lengths >= 2)
    pieces = np.maximum(-(-(lengths[kept] - 1) // max_seq_len), 1)
    document = np.repeat(kept, pieces)
    number = np.arange(len(document), dtype=np.int64) - np.repeat(np.cumsum(pieces) - pieces, pieces)
    start = number * max_seq_len
    stop = np.minimum(start + max_seq_len, lengths[document])
    windows = Windows(document, start, stop, start)
    return windows.take(_within(stop - start, max_tokens))


def short_windows(whole: Windows, context_tokens: int) -> Windows:
    """The targets of `whole` that have more than `context_tokens` tokens to look at, with between half as many and that."""
    step = max(context_tokens // 2, 1)
    document, start, stop, first = [], [], [], []
    for row in np.flatnonzero(whole.stop - whole.start > context_tokens).tolist():
        begin, end = int(whole.start[row]), int(whole.stop[row])
        targets = np.arange(begin + context_tokens, end, step, dtype=np.int64)
        first.append(targets)
        start.append(targets + step - context_tokens)
        stop.append(np.minimum(targets + step, end))
        document.append(np.full(len(targets), whole.document[row], dtype=np.int64))
    none = [np.zeros(0, dtype=np.int64)]
    return Windows(*(np.concatenate(none + column) for column in (document, start, stop, first)))


def length_windows(lengths: np.ndarray, eval_lengths: list[int], max_tokens: int | None) -> dict[int, Windows]:
    """One pass for each of `eval_lengths`; every window of one pass has its like, with the same targets, in the others.

    Documents shorter than the longest length have none; there may be none at all.
    """
    if not eval_lengths:
        return {}
    shortest, longest = min(eval_lengths), max(eval_lengths)
    counts = lengths // longest
    document = np.repeat(np.arange(len(lengths), dtype=np.int64), counts)
    number = np.arange(len(document), dtype=np.int64) - np.repeat(np.cumsum(counts) - counts, counts)
    stop = (number + 1) * longest
    rows = _within(np.full(len(document), longest, dtype=np.int64), max_tokens)
    document, stop = document[rows], stop[rows]
    first = stop - shortest // 2
    return {length: Windows(document, stop - length, stop, first) for length in sorted(set(eval_lengths))}


def _within(sizes: np.ndarray, max_tokens: int | None) -> np.ndarray:
    """Rows, in order, whose sizes add up to at most `max_tokens`: the first of a fixed shuffle, so spread over the corpus.

    The first one is there in any case.
    """
    if max_tokens is None or int(sizes.sum()) <= max_tokens:
        return np.arange(len(sizes))
    order = shuffled(len(sizes), 0, 0)
    count = int(np.searchsorted(np.cumsum(sizes[order]), max_tokens, side="right"))
    return np.sort(order[: max(count, 1)])
