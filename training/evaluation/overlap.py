"""Finds documents that an evaluation shares with training, by hashes. Reads no more of the training corpora than it has to."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..data.indexed import IndexedCorpus

HEAD_TOKENS = 64
MOST_COMPARED = 20_000
"""Documents of a corpus whose beginnings are read at most, spread evenly over those that could be the same: seconds on slow storage."""


@dataclass(frozen=True, slots=True)
class Shared:
    """Documents of one evaluation corpus that are training documents too."""

    documents: tuple[int, ...]
    first: str
    """Where the first of them is in training."""
    is_complete: bool
    """False: some documents were not looked at."""


def shared_documents(held_out: IndexedCorpus, training: Sequence[IndexedCorpus]) -> Shared | None:
    """Documents of `held_out` with the same tokens as one of `training`; None where there is none. Lengths first, then beginnings."""
    beginnings: dict[bytes, list[int]] = {}
    own = np.flatnonzero(held_out.lengths > 0)
    complete = len(own) <= MOST_COMPARED
    for document in _spread(own):
        beginnings.setdefault(_digest(held_out, document, HEAD_TOKENS), []).append(document)
    found: dict[int, str] = {}
    for corpus in training:
        like = np.flatnonzero(np.isin(corpus.lengths, held_out.lengths) & (corpus.lengths > 0))
        complete = complete and len(like) <= MOST_COMPARED
        for document in _spread(like):
            for other in beginnings.get(_digest(corpus, document, HEAD_TOKENS), ()):
                if other not in found and _digest(corpus, document) == _digest(held_out, other):
                    found[other] = f"document {document} of {corpus.prefix}"
    if not found:
        return None
    first = min(found)
    return Shared(tuple(sorted(found)), found[first], complete)


def _spread(documents: np.ndarray) -> list[int]:
    """At most MOST_COMPARED of them."""
    return [int(document) for document in documents[:: max(1, -(-len(documents) // MOST_COMPARED))]]


def _digest(corpus: IndexedCorpus, document: int, most: int | None = None) -> bytes:
    """Hash of a document's length and of its first `most` tokens (None: all)."""
    length = int(corpus.lengths[document])
    tokens = corpus.tokens(document, 0, length if most is None else min(most, length))
    return hashlib.blake2b(np.ascontiguousarray(tokens).data, digest_size=16, salt=length.to_bytes(8, "little")).digest()


def overlap_notes(corpora: Sequence[tuple[str, IndexedCorpus]], training: Sequence[IndexedCorpus]) -> list[str]:
    """A line for each evaluation corpus (by name) that shares documents with training."""
    notes = []
    for name, held_out in corpora:
        shared = shared_documents(held_out, training)
        if shared is not None:
            which = f"document {shared.documents[0]} is {shared.first}"
            part = "" if shared.is_complete else ", of those compared"
            notes.append(
                f"eval.corpora.{name} shares {len(shared.documents):,} of {held_out.num_documents:,} documents with training ({which}"
                f"{part}): their loss says nothing about new text"
            )
    return notes
