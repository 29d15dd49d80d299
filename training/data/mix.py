"""Gives each step its sequences of every source: streams of shuffled epochs, each as far as the run's course says (mix_course.py)."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np

from ...errors import ConfigError, DataError
from ...units import format_tokens
from .config import DataConfig, length_classes
from .indexed import IndexedCorpus
from .mix_course import MixCourse, MixSettings, Place, Segment, first_course, load_mix_course, resumed_course
from .sampler import EpochStream, SequenceTable


@dataclass(frozen=True, slots=True)
class MixStream:
    """The sequences of a source, or of one class of lengths in it, and their share of a step's tokens."""

    name: str
    source: str
    rows: np.ndarray
    """Rows of the table, int64."""
    share: Fraction
    max_epochs: float | None
    digest: str
    epochs: EpochStream


@dataclass(frozen=True, slots=True)
class SourceUse:
    """What a run has had of a source before a step."""

    name: str
    tokens: int
    share: float
    """Of the tokens of all sources so far."""
    epochs: float
    """How often its documents were seen; where lengths have weights, those that were seen most."""


class MixedSampler:
    """Cuts several streams into steps of `batch_tokens` together, by their shares: never empty, as one stream's share holds a sequence."""

    def __init__(self, table: SequenceTable, streams: Sequence[MixStream], seed: int, batch_tokens: int, where: str = "data") -> None:
        """ConfigError where no stream's share of a step holds the longest of its sequences: a step could be empty.

        `where`: key of what sets the batch, for messages.
        """
        self.table, self.streams, self.seed, self.batch_tokens = table, list(streams), seed, batch_tokens
        self.epoch_tokens = sum(stream.epochs.tokens for stream in streams)
        needed = min(-(-stream.epochs.longest // stream.share) for stream in streams if stream.share)
        if batch_tokens < needed:
            raise ConfigError(
                f"{where}.global_batch_tokens",
                found=format_tokens(batch_tokens),
                expected="so many that the share of one source holds its longest sequence, or steps could be empty",
                hint=f"{needed} tokens there (data.global_batch_tokens has to be as many), or a smaller max_seq_len"
                if where != "data"
                else f"data.global_batch_tokens={needed}, or a smaller data.max_seq_len",
            )
        self.settings = MixSettings(
            batch_tokens,
            {stream.name: stream.share for stream in streams},
            {stream.name: stream.digest for stream in streams},
            {stream.name: stream.epochs.tokens for stream in streams},
        )
        self.course: MixCourse = first_course(self.settings)

    def step(self, step: int) -> np.ndarray:
        """Indices (int64) into the table of the sequences of a step, counted from 0, source after source.

        DataError for a step of before a change of the mix whose sources are not there any more.
        """
        segment = self.course.segment(step)
        self._check_streams(segment, step)
        parts = []
        for stream in self.streams:
            if stream.name not in segment.shares:
                continue
            low, high = (segment.cursor(stream.name, at) for at in (step, step + 1))
            parts.append(stream.rows[stream.epochs.between(low, high)])
        return np.concatenate(parts)

    def _check_streams(self, segment: Segment, step: int) -> None:
        for name, share in segment.shares.items():
            if share and self.settings.digests.get(name) != segment.places[name].digest:
                raise DataError(
                    f"step {step + 1}",
                    found=f"a mix in which {name.partition(':')[0]} had other documents, or was there",
                    expected="the sources, their classes of lengths and data.max_seq_len of that time",
                    hint="the configuration of that start, in the run's revisions",
                )

    def resume(self, saved: Sequence[Mapping[str, Any]] | None, done: int) -> bool:
        """Go on after `done` steps of a `dump`ed course; whether the mix is another from here on."""
        self.course, is_new = resumed_course(self.settings, load_mix_course(saved), done)
        return is_new

    def describe(self) -> str:
        """`code 30.0 % of the tokens, web 70.0 %`: the shares from here on."""
        shares: dict[str, Fraction] = {}
        for stream in self.streams:
            shares[stream.source] = shares.get(stream.source, Fraction(0)) + stream.share
        first, *others = (f"{name} {float(100 * share):.1f} %" for name, share in sorted(shares.items()))
        return ", ".join([f"{first} of the tokens", *others])

    def usage(self, step: int) -> list[SourceUse]:
        """What was given out of each source before step `step`, counted from 0."""
        segment = self.course.segment(max(step - 1, 0))
        tokens: dict[str, int] = {}
        epochs: dict[str, float] = {}
        for stream in self.streams:
            place = segment.places.get(stream.name, Place(0, stream.digest))
            at = stream.epochs.start_from(segment.cursor(stream.name, step)) if stream.name in segment.places else 0
            tokens[stream.source] = tokens.get(stream.source, 0) + place.tokens_before + at
            epochs[stream.source] = max(epochs.get(stream.source, 0.0), place.epochs_before + at / stream.epochs.tokens)
        total = sum(tokens.values()) or 1
        return [SourceUse(name, tokens[name], tokens[name] / total, epochs[name]) for name in sorted(tokens)]

    def check_epochs(self, steps: int) -> None:
        """Raise DataError for a source that `steps` steps of the course see more often than its max_epochs."""
        segment = self._ending_at(steps)
        for stream in self.streams:
            place = segment.places[stream.name]
            seen = place.epochs_before + segment.cursor(stream.name, steps) / stream.epochs.tokens
            if stream.max_epochs is None or seen <= stream.max_epochs or stream.share == 0:
                continue
            key = f"data.sources.{stream.source}"
            raise DataError(
                f"{key}.max_epochs",
                found=f"{seen:.2f} epochs of {stream.epochs.tokens:,} tokens{_of_class(stream)} in train.steps={steps}",
                expected=f"at most {stream.max_epochs:g}: the source is exhausted {self._end(stream, steps)}",
                hint=f"a smaller {key}.weight or train.steps, more documents, or {key}.max_epochs={-(-seen // 0.1) / 10:g}",
            )

    def _ending_at(self, steps: int) -> Segment:
        """The segment that step `steps` ends; one that begins there where this mix is new there."""
        own = [one for one in self.course.segments if set(self.settings.digests) <= set(one.places)]
        return next((one for one in reversed(own) if one.start < steps), own[0])

    def _end(self, stream: MixStream, steps: int) -> str:
        """Says after which step the source has nothing left."""
        assert stream.max_epochs is not None
        segment = self._ending_at(steps)
        place = segment.places[stream.name]
        left = (stream.max_epochs - place.epochs_before) * stream.epochs.tokens - place.at
        last = segment.start + max(0, int(left / (self.batch_tokens * stream.share)))
        return f"after step {last}"


def _of_class(stream: MixStream) -> str:
    least = stream.name.partition(":")[2]
    return f" (documents of {format_tokens(int(least))} tokens or more)" if least and int(least) else ""


def mix_streams(config: DataConfig, corpora: Sequence[IndexedCorpus], table: SequenceTable, seed: int) -> list[MixStream]:
    """The streams of data.sources; corpora and table in the order of corpus_prefixes. DataError for a source without a sequence."""
    total = sum(Fraction(str(source.weight)) for source in config.sources.values())
    streams, first = [], 0
    for name, source in sorted(config.sources.items()):
        number = len(source.prefixes)
        rows = np.flatnonzero((table.corpus >= first) & (table.corpus < first + number))
        if len(rows) == 0:
            raise DataError(
                f"data.sources.{name}",
                found="no sequence to train on",
                expected="documents of two tokens or more, not all dropped",
                hint=f"data.sources.{name}.prefixes=[PREFIX] of other corpora",
            )
        share = Fraction(str(source.weight)) / total
        classes = _classes(config, name, corpora, table, rows)
        whole = sum(Fraction(str(weight)) * int(table.lengths_of(part).sum()) for _, weight, part in classes)
        if whole == 0:
            key, hint = f"data.sources.{name}.length_weights", f"data.sources.{name}.weight=0, to leave it out"
            raise DataError(key, found="a weight of 0 for every document there is", expected="one above 0", hint=hint)
        for least, weight, part in classes:
            inside = Fraction(str(weight)) * int(table.lengths_of(part).sum()) / whole
            stream = name if len(source.length_weights) == 0 else f"{name}:{least}"
            epochs = EpochStream(table.lengths_of(part), _seed_of(seed, stream))
            digest = _digest(table, part, first)
            streams.append(MixStream(stream, name, part, share * inside, source.max_epochs, digest, epochs))
        first += number
    return streams


def _classes(
    config: DataConfig, name: str, corpora: Sequence[IndexedCorpus], table: SequenceTable, rows: np.ndarray
) -> list[tuple[int, float, np.ndarray]]:
    """(least tokens of a document, weight, rows) of each class of lengths that has documents. Pieces belong to their document's class."""
    classes = length_classes(config.sources[name], f"data.sources.{name}")
    if len(classes) == 1:
        return [(0, 1.0, rows)]
    whole = np.empty(len(rows), dtype=np.int64)
    for number in np.unique(table.corpus[rows]).tolist():
        mine = table.corpus[rows] == number
        whole[mine] = corpora[number].lengths[table.document[rows[mine]]]
    place = np.searchsorted([least for least, _ in classes], whole, side="right") - 1
    parts = [(least, weight, rows[place == index]) for index, (least, weight) in enumerate(classes)]
    return [part for part in parts if len(part[2])]


def _seed_of(seed: int, stream: str) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed} {stream}".encode()).digest()[:8], "little")


def _digest(table: SequenceTable, rows: np.ndarray, first: int) -> str:
    """Names the sequences of a stream, whatever other sources there are."""
    digest = hashlib.sha256()
    for column in (table.corpus[rows].astype(np.int64) - first, table.document[rows], table.start[rows], table.stop[rows]):
        digest.update(np.ascontiguousarray(column, dtype="<i8").data)
    return digest.hexdigest()[:16]
