"""Settings of the data: what is trained on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import ClassVar

from ...units import Tokens
from ...utils.ranges import TOKENS, Range


class LongDocuments(Enum):
    """What happens to documents longer than `data.max_seq_len`."""

    SPLIT = "split"
    DROP = "drop"


class DataChanged(Enum):
    """What happens where corpora were replaced since the checkpoint that is resumed, and no setting says so."""

    REFUSE = "refuse"
    ACCEPT = "accept"


@dataclass(frozen=True, kw_only=True, slots=True)
class DataConfig:
    """Settings of the documents that are trained on and of how many a step has."""

    name: str
    prefixes: list[str] = field(default_factory=list)
    """Megatron indexed corpora: PREFIX.bin + PREFIX.idx (+ PREFIX.mask.bin where a loss mask is kept)."""
    builtin: str | None = None
    """A corpus made on the spot instead of `prefixes`: `python_stdlib` (source files of this Python)."""
    tokenizer: str | None = None
    """Directory, tokenizer.json or hub name; its vocabulary must fit the model's. None: made with the built-in corpus."""
    vocab_size: int | None = None
    """Vocabulary of the tokenizer trained for a built-in corpus."""
    cache_dir: str | None = None
    """Where built-in corpora are kept; None: the user's cache directory."""
    max_seq_len: Tokens
    """Longest sequence; longer documents are split or dropped."""
    long_documents: LongDocuments = LongDocuments.SPLIT
    global_batch_tokens: Tokens
    """Tokens of one optimizer step, over all ranks; at least max_seq_len."""
    changed: DataChanged = DataChanged.REFUSE
    """Corpora that hold something else than when the run's checkpoint was written: accept trains on with them, for this start."""

    RANGES: ClassVar[Mapping[str, Range]] = {
        "vocab_size": Range(257, 1 << 28),
        "max_seq_len": Range(2, TOKENS),
        "global_batch_tokens": Range(2, 1 << 50),
    }
