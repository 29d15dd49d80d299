"""Which data a run trains on, as its checkpoints keep it: what changed since is named, and what nobody asked for is refused.

Lengths, tokens, loss masks and rewards are hashed each by itself: all of a small corpus, evenly spread samples of a large one.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ...errors import DataError
from ..config import Learn
from .config import DataChanged, DataConfig, SourceConfig
from .indexed import IndexedCorpus
from .train_stages import Stage

SAMPLE_BLOCKS, BLOCK_NUMBERS = 256, 4096
"""At most so many blocks of so many numbers are read of a column."""
_NAMES = ("data.prefixes:", "data.sources:", "data.builtin:")
"""Settings that say which corpora there are."""
STAGES, LEARN, CROSS = "train.stages", "train.learn", "data.cross_document"
_DEFAULTS: Mapping[str, Any] = {STAGES: [], LEARN: Learn.ASSISTANT.value, CROSS: False}
"""Settings that checkpoints of earlier versions do not hold, as they were then."""
_PARTS = {"documents": "document lengths", "tokens": "tokens", "mask": "loss mask", "scalars": "rewards"}


def corpus_content(corpus: IndexedCorpus) -> dict[str, str | None]:
    """A hash of each part of a corpus by its name in `_PARTS`; None: it has no such part. Independent of place and integer width."""
    return {
        "documents": _hash(corpus.stored_lengths),
        **{name: None if column is None else _hash(column) for name, column in corpus.columns().items()},
    }


def _hash(column: np.ndarray) -> str:
    digest = hashlib.sha256(str(len(column)).encode())
    for start in block_starts(len(column)):
        block = np.asarray(column[start : start + BLOCK_NUMBERS])
        digest.update(np.ascontiguousarray(block, dtype="<f8" if block.dtype.kind == "f" else "<i8").data)
    return digest.hexdigest()


def block_starts(length: int) -> list[int]:
    """Where the blocks that are read begin: all where they are few, else as many, evenly spread from the first to the last number."""
    if length <= SAMPLE_BLOCKS * BLOCK_NUMBERS:
        return list(range(0, length, BLOCK_NUMBERS))
    last = length - BLOCK_NUMBERS
    return [last * index // (SAMPLE_BLOCKS - 1) for index in range(SAMPLE_BLOCKS)]


def settings_of(config: DataConfig, seed: int, stages: Sequence[Stage] = (), learn: Learn = Learn.ASSISTANT) -> dict[str, Any]:
    """What decides, beside the corpora, which documents a step has; by its key. `stages`: those of train.stages."""
    return {
        "train.seed": seed,
        "data.prefixes": list(config.prefixes),
        "data.sources": {name: list(source.prefixes) for name, source in sorted(config.sources.items())},
        "data.sources' weights": {name: _weights(source) for name, source in sorted(config.sources.items())},
        "data.builtin": config.builtin,
        "data.vocab_size": config.vocab_size,
        "data.max_seq_len": config.max_seq_len,
        "data.long_documents": config.long_documents.value,
        "data.global_batch_tokens": config.global_batch_tokens,
        STAGES: [_stage(stage) for stage in stages],
        LEARN: learn.value,
        CROSS: config.cross_document,
    }


def _stage(stage: Stage) -> list[Any]:
    weights = {name: source.weight for name, source in sorted(stage.data.sources.items())}
    return [stage.start, stage.data.max_seq_len, stage.data.global_batch_tokens, weights]


def _weights(source: SourceConfig) -> dict[str, Any]:
    return {"weight": source.weight, "length_weights": dict(source.length_weights)}


def data_identity(corpora: Sequence[IndexedCorpus], settings: Mapping[str, Any], stream: str | None) -> dict[str, Any]:
    """What a checkpoint keeps, as JSON. `stream`: DataSource.fingerprint(); None where the sequences were not looked up."""
    described = [{"prefix": corpus.prefix, **corpus_content(corpus)} for corpus in corpora]
    return {"settings": dict(settings), "corpora": described, "stream": stream}


@dataclass(frozen=True, slots=True)
class DataChanges:
    """What is different from the data of a checkpoint."""

    asked_for: tuple[str, ...]
    """Changes that follow from settings that were changed."""
    silent: tuple[str, ...]
    """Changes that follow from no changed setting: files were replaced."""

    @property
    def lines(self) -> tuple[str, ...]:
        return (*self.silent, *self.asked_for)


def data_changes(saved: object, now: Mapping[str, Any]) -> DataChanges:
    """Compare two identities. A checkpoint of an earlier version has `stream` alone; what it does not hold is not compared."""
    if not isinstance(saved, Mapping):
        other = isinstance(saved, str) and now["stream"] is not None and saved != now["stream"]
        return DataChanges(("other documents, lengths, seed or batch",) if other else (), ())
    settings = [
        f"{key}: {saved['settings'].get(key, _DEFAULTS.get(key))} -> {value}"
        for key, value in now["settings"].items()
        if saved["settings"].get(key, _DEFAULTS.get(key, value)) != value
    ]
    replaced = _replaced(saved["corpora"], now["corpora"])
    is_moved = not replaced and len(saved["corpora"]) == len(now["corpora"])
    if is_moved:
        # The same documents in another place.
        settings = [line for line in settings if not line.startswith(_NAMES)]
    names_other = any(line.startswith((*_NAMES, "data.vocab_size:")) for line in settings)
    if names_other:
        return DataChanges((*settings, *replaced), ())
    if not settings and not replaced and now["stream"] is not None and saved["stream"] not in (None, now["stream"]):
        return DataChanges((), ("the sequences that are cut from the corpora",))
    return DataChanges(tuple(settings), tuple(replaced))


def _replaced(saved: Sequence[Mapping[str, Any]], now: Sequence[Mapping[str, Any]]) -> list[str]:
    if len(saved) != len(now):
        return [f"{len(now)} corpora, not {len(saved)}"]
    lines = []
    for before, after in zip(saved, now, strict=True):
        parts = [text for part, text in _PARTS.items() if before.get(part) != after.get(part)]
        if parts:
            lines.append(f"corpus {after['prefix']}: other {', '.join(parts)}")
    return lines


def check_data_changes(changes: DataChanges, accepts: DataChanged, step: int) -> None:
    """Raise DataError where the data of the checkpoint of `step` was replaced and data.changed does not accept it."""
    if changes.silent and accepts is DataChanged.REFUSE:
        raise DataError(
            f"data of the checkpoint of step {step}",
            found="something else now: " + "; ".join(changes.silent),
            expected="what the run was trained on so far",
            hint="bring the files back, or data.changed=accept to train on with what is there now; run.id=ANOTHER for a new run",
        )
