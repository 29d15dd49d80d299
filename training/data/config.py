"""Settings of the data: what is trained on."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import ClassVar

from ...errors import ConfigError
from ...units import Tokens, parse_quantity
from ...utils.ranges import TOKENS, Range

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")


class LongDocuments(Enum):
    """What happens to documents longer than `data.max_seq_len`."""

    SPLIT = "split"
    DROP = "drop"
    TRUNCATE = "truncate"


class DataChanged(Enum):
    """What happens where corpora were replaced since the checkpoint that is resumed, and no setting says so."""

    REFUSE = "refuse"
    ACCEPT = "accept"


@dataclass(frozen=True, kw_only=True, slots=True)
class SourceConfig:
    """Settings of one source of a mix: corpora that have a share of every step's tokens (docs/mixes.md)."""

    prefixes: list[str]
    """Indexed corpora, as data.prefixes."""
    weight: float = 1.0
    """Share of the tokens, beside the weights of the other sources."""
    max_epochs: float | None = None
    """Most times that a document may be seen over all of train.steps; None: as often as the weight asks for."""
    length_weights: dict[str, float] = field(default_factory=dict)
    """Lengths and weights of documents that are at least so long, as {8K: 2, 64K: 5}; shorter ones than any have 1."""

    RANGES: ClassVar[Mapping[str, Range]] = {
        "weight": Range(0, 1e9),
        "max_epochs": Range(0, 1e6, above=True, example=1),
        "length_weights": Range(0, 1e9),
    }


@dataclass(frozen=True, kw_only=True, slots=True)
class DataConfig:
    """Settings of the documents that are trained on and of how many a step has."""

    name: str
    prefixes: list[str] = field(default_factory=list)
    """Megatron indexed corpora: PREFIX.bin + PREFIX.idx (+ PREFIX.mask.bin where a loss mask is kept)."""
    sources: dict[str, SourceConfig] = field(default_factory=dict)
    """Corpora with shares of the tokens, in place of `prefixes`, as {web: {prefixes: [web], weight: 0.7}, code: {...}}."""
    builtin: str | None = None
    """A corpus made on the spot instead of `prefixes`: `python_stdlib` (source files of this Python)."""
    tokenizer: str | None = None
    """Directory, tokenizer.json or hub name; its vocabulary must fit the model's. None: made with the built-in corpus."""
    vocab_size: int | None = None
    """Vocabulary of the tokenizer trained for a built-in corpus."""
    cache_dir: str | None = None
    """Where built-in corpora are kept; None: the user's cache directory."""
    max_seq_len: Tokens
    """Longest sequence; longer documents are split, dropped or truncated."""
    long_documents: LongDocuments = LongDocuments.SPLIT
    cross_document: bool = False
    """Sequences are cut from documents that lie end to end, and attention goes over their borders; false: each keeps to itself."""
    global_batch_tokens: Tokens
    """Tokens of one optimizer step, over all ranks; at least max_seq_len."""
    changed: DataChanged = DataChanged.REFUSE
    """Corpora that hold something else than when the run's checkpoint was written: accept trains on with them, for this start."""

    RANGES: ClassVar[Mapping[str, Range]] = {
        "vocab_size": Range(257, 1 << 28),
        "max_seq_len": Range(2, TOKENS),
        "global_batch_tokens": Range(2, 1 << 50),
    }


def corpus_prefixes(config: DataConfig) -> list[str]:
    """Every corpus that is trained on, in the order of their numbers: those of sources by the sources' names."""
    return [*config.prefixes, *(prefix for name in sorted(config.sources) for prefix in config.sources[name].prefixes)]


def length_classes(source: SourceConfig, key: str) -> list[tuple[int, float]]:
    """(least tokens of a document, weight) of a source's classes of lengths, from 0 tokens on; ConfigError for what is no length.

    `key`: the source's, for messages.
    """
    classes = {0: 1.0}
    for text, weight in source.length_weights.items():
        try:
            classes[int(parse_quantity(text, "tokens"))] = weight
        except ValueError as error:
            raise ConfigError(
                f"{key}.length_weights",
                found=f"the length {text!r}"[:200],
                expected="lengths in tokens, and a weight for each",
                hint=f"{key}.length_weights={{8K: 2, 64K: 5}}",
            ) from error
    return sorted(classes.items())


def check_cross_document(config: DataConfig, *, language_modelling: bool) -> None:
    """Raise ConfigError for settings that need documents by themselves, where data.cross_document joins them."""
    if not config.cross_document:
        return
    weighed = [name for name, source in sorted(config.sources.items()) if source.length_weights]
    if not language_modelling:
        found, expected, hint = "true with pairs or completions", "it with train.objective=language_modelling only", ""
    elif config.long_documents is not LongDocuments.SPLIT:
        found, expected = f"true with data.long_documents={config.long_documents.value}", "split: joined documents have no length"
        hint = "data.long_documents=split, or "
    elif weighed:
        found, expected = f"true with lengths that have weights in data.sources.{weighed[0]}", "none: joined documents have no length"
        hint = f"data.sources.{weighed[0]}.length_weights={{}}, or "
    else:
        return
    raise ConfigError("data.cross_document", found=found, expected=expected, hint=f"{hint}data.cross_document=false")


def check_sources(config: DataConfig) -> None:
    """Raise ConfigError where names, prefixes or weights of data.sources make no mix."""
    owners: dict[str, str] = {}
    for name, source in sorted(config.sources.items()):
        key = f"data.sources.{name}"
        if not _NAME.fullmatch(name):
            expected, hint = "letters, digits, `.`, `_` and `-`", "data.sources={web: {prefixes: [PREFIX]}}"
            raise ConfigError("data.sources", found=f"the name {name!r}"[:200], expected=expected, hint=hint)
        if not source.prefixes:
            raise ConfigError(f"{key}.prefixes", found="none", expected="at least one corpus", hint=f"{key}.prefixes=[PREFIX]")
        for prefix in source.prefixes:
            other = owners.setdefault(prefix, name)
            if other != name or source.prefixes.count(prefix) > 1:
                expected, hint = "each corpus once", f"data.sources.{other}.weight=NUMBER, to see more of its documents"
                raise ConfigError(f"{key}.prefixes", found=f"{prefix}, which {other} has", expected=expected, hint=hint)
        if not any(weight for _, weight in length_classes(source, key)):
            found = "weights of 0 alone"
            raise ConfigError(f"{key}.length_weights", found=found, expected="one above 0", hint=f"{key}.weight=0, to leave it out")
    if config.sources and not any(source.weight for source in config.sources.values()):
        name = sorted(config.sources)[0]
        found = f"{len(config.sources)} weights of 0"
        raise ConfigError("data.sources", found=found, expected="weights that sum to more than 0", hint=f"data.sources.{name}.weight=1")
