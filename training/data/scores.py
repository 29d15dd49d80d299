"""Log-probabilities of a corpus's answers under weights that are not in training: the reference of DPO, the old policy of GRPO.

Beside a corpus of pairs there may be PREFIX.ref.bin: two float64 per document, the summed log-probabilities of the chosen and of
the rejected answer. Beside one of completions PREFIX.old.bin (under the weights that sampled them) and PREFIX.ref.bin (under the
reference): one float32 per token, the token's log-probability given those before it; only answers' tokens are read. What is
missing the run computes with its initial weights, before its first step (training/score_corpus.py), into RUN_DIR/scores/.
"""

from __future__ import annotations

import hashlib
import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ...errors import DataError
from ...utils.atomic_files import write_atomic
from ...utils.decode import decode, set_aside
from ..config import Objective, TrainConfig
from .identity import corpus_content
from .indexed import IndexedCorpus, Kind, open_companion
from .source import DataSource

log = logging.getLogger(__name__)
ORIGINS = "origins.json"
_CONTENT = "content:"
"""Begins digests of what a corpus holds."""
MEANING = {
    Kind.PAIRS: "log-probabilities of both answers of each document",
    Kind.COMPLETIONS: "the log-probability of each token",
}


def score_shape(corpus: IndexedCorpus) -> tuple[np.dtype[Any], int]:
    """Type and count of the log-probabilities of a corpus."""
    if corpus.kind is Kind.PAIRS:
        return np.dtype("<f8"), 2 * corpus.num_documents
    return np.dtype("<f4"), corpus.num_tokens


def run_scores(run_dir: Path, index: int, corpus: IndexedCorpus) -> Path:
    """Where a run keeps what it computes of its corpus `index`."""
    return run_dir / "scores" / f"{index}-{Path(corpus.prefix).name}.ref.bin"


def corpus_digest(corpus: IndexedCorpus) -> str:
    """A digest that changes with what the corpus holds (identity.corpus_content)."""
    content = json.dumps(corpus_content(corpus), sort_keys=True)
    return _CONTENT + hashlib.sha256(content.encode()).hexdigest()


def _is_of(corpus: IndexedCorpus, digest: str | None) -> bool:
    if digest is None or digest.startswith(_CONTENT):
        return digest == corpus_digest(corpus)
    # Of an earlier version: by what the corpus was prepared from.
    earlier = hashlib.sha256(repr((corpus.metadata or {}).get("fingerprint")).encode())
    earlier.update(np.ascontiguousarray(corpus.lengths).data)
    return digest == earlier.hexdigest()


def write_origins(run_dir: Path, origins: dict[str, dict[str, str]]) -> None:
    """Record of which corpus and which weights the files in RUN_DIR/scores are: {file name: {"corpus", "weights"}}."""
    path = run_dir / "scores" / ORIGINS
    write_atomic(path, json.dumps({**_read_origins(run_dir), **origins}, indent=1))


def _read_origins(run_dir: Path) -> dict[str, dict[str, str]]:
    path = run_dir / "scores" / ORIGINS
    if not path.exists():
        return {}
    try:
        return decode(_Origins, {"files": json.loads(path.read_text(encoding="utf-8"))}).files
    except (ValueError, RecursionError) as error:
        # Scores of unknown origin are computed again.
        log.warning("%s", set_aside(path, error))
        return {}


@dataclass(frozen=True, slots=True)
class _Origins:
    """What origins.json holds."""

    files: dict[str, dict[str, str]]


@dataclass(frozen=True, slots=True)
class _Columns:
    old: np.ndarray | None
    reference: np.ndarray | None


class Scores:
    """Log-probabilities of every corpus of a source: from beside the corpora, else the run's own. Memory-mapped."""

    def __init__(self, source: DataSource, run_dir: Path, train: TrainConfig, weights: str | None) -> None:
        """Open them; `weights`: what the run's own must be of, and are not where it was begun anew; None: taken as they are.

        DataError for a file of another length. What is in neither place is in `missing`.
        """
        self._source, self._weights = source, weights
        self._columns = [self._open(index, corpus, run_dir) for index, corpus in enumerate(source.corpora)]
        needs_old, needs_reference = needed_scores(train)
        self.missing = [
            index
            for index, column in enumerate(self._columns)
            if (needs_old and column.old is None) or (needs_reference and column.reference is None)
        ]
        """Corpora (by index) that the objective needs and has no log-probabilities of."""
        self.has_reference = all(column.reference is not None for column in self._columns)

    def _open(self, index: int, corpus: IndexedCorpus, run_dir: Path) -> _Columns:
        if corpus.kind is Kind.DOCUMENTS:
            return _Columns(None, None)
        path = run_scores(run_dir, index, corpus)
        origin = _read_origins(run_dir).get(path.name, {})
        fits = _is_of(corpus, origin.get("corpus")) and self._weights in (None, origin.get("weights"))
        own = _own(path, corpus) if fits else None
        old, reference = (_open(f"{corpus.prefix}.{name}.bin", corpus) for name in ("old", "ref"))
        return _Columns(own if old is None else old, own if reference is None else reference)

    def pair(self, step: int, index: int) -> np.ndarray:
        """Log-probabilities (2,) float64 of the answers of the step's sequence `index` under the reference."""
        sequence = self._source.sequence(step, index)
        reference = self._columns[sequence.corpus].reference
        assert reference is not None, "scored before the first step"
        return self._checked(np.array(reference[2 * sequence.document : 2 * sequence.document + 2]), step, index)

    def completion(self, step: int, index: int, start: int, stop: int) -> tuple[float, np.ndarray, np.ndarray | None]:
        """Advantage of the step's sequence `index`; log p_old and log p_ref of the tokens after positions `start ... stop - 1`."""
        sequence = self._source.sequence(step, index)
        corpus, columns = self._source.corpora[sequence.corpus], self._columns[sequence.corpus]
        assert columns.old is not None, "scored before the first step"
        end = int(corpus.lengths[sequence.document])
        span = corpus.span(sequence.document, min(start + 1, end), min(stop + 1, end))

        def padded(values: np.ndarray) -> np.ndarray:
            log_probs = self._checked(values[span].astype(np.float64), step, index)
            # The last position of a document has no target.
            return np.append(log_probs, np.zeros(stop - start - len(log_probs)))

        reference = padded(columns.reference) if self.has_reference and columns.reference is not None else None
        return corpus.advantage(sequence.document), padded(columns.old), reference

    def _checked(self, values: np.ndarray, step: int, index: int) -> np.ndarray:
        if len(values) == 0 or not np.isnan(values).all():
            return values
        raise DataError(
            self._source.describe(step, index),
            found="no log-probabilities: it was left out when the corpus was scored",
            expected="the documents this run began with",
            hint="the data.max_seq_len and data.long_documents it began with, or a new run",
        )


def needed_scores(train: TrainConfig) -> tuple[bool, bool]:
    """Whether the objective needs (old, reference) log-probabilities."""
    grpo = train.objective is Objective.GRPO
    return grpo, train.objective is Objective.DPO or (grpo and train.grpo_kl_weight > 0)


def _own(path: Path, corpus: IndexedCorpus) -> np.ndarray | None:
    """Open a file that the run made as _open does; one of another length is set aside and recomputed."""
    try:
        return _open(str(path), corpus)
    except DataError as error:
        log.warning("%s", set_aside(path, error.found))
        return None


def _open(path: str, corpus: IndexedCorpus) -> np.ndarray | None:
    dtype, count = score_shape(corpus)
    hint = f"one made for this corpus, or none: without {path} the run computes its own"
    return open_companion(path, dtype, count, MEANING[corpus.kind], hint) if Path(path).exists() else None
