"""Small corpora for tests."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from efflaunch.training.data.indexed import IndexedCorpus
from efflaunch.training.data.sampler import Sampler, SequenceTable
from efflaunch.training.data.source import DataSource
from efflaunch.training.data.writer import IndexedWriter


def write_corpus(prefix: Path, documents: list[list[int]], masks: list[list[int]] | None = None, dtype: str = "uint16") -> str:
    """An indexed corpus of the given token ids at `prefix`."""
    writer = IndexedWriter(str(prefix), dtype)
    for index, document in enumerate(documents):
        mask = None if masks is None else np.array(masks[index], dtype=bool)
        writer.add(np.array(document, dtype=np.int64), mask)
    writer.finish()
    return str(prefix)


def open_source(prefix: str, *, max_seq_len: int, batch: int, vocab_size: int = 1000, seed: int = 0) -> DataSource:
    """A source over one corpus, with documents split."""
    corpus = IndexedCorpus(prefix)
    table = SequenceTable.from_lengths([corpus.lengths], max_seq_len=max_seq_len, split=True)
    return DataSource([corpus], table, Sampler(table, seed, batch), vocab_size)
