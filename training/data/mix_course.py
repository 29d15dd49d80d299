"""Decides how far each stream of a mix is at a step: a pure function of the weights a run has had so far. No torch, no numpy.

Note: shares. A step of B tokens gives stream i the tokens [C_i(s), C_i(s + 1)) of its own endless stream of shuffled epochs, with
C_i(s) = C_i(s0) + floor((s - s0) B w_i) for the weights w_i since step s0: shares are exact to the token, whatever the layout and
wherever a run was resumed, and as the cursor only moves on, no document comes twice in an epoch. Where weights or the batch change
on resume a new segment begins at that step, with the cursors where they were. Weights are fractions of whole numbers: no
rounding adds up, and every machine has the same.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any


@dataclass(frozen=True, slots=True)
class Place:
    """How far a stream is where a segment begins."""

    at: int
    """Tokens of the stream that were given out."""
    digest: str
    """Names the sequences of the stream: of others, the place means nothing."""
    tokens_before: int = 0
    """Tokens given out of streams of the same name, or of the source's other classes of lengths, that held other sequences."""
    epochs_before: float = 0.0

    def on(self, digest: str, epoch_tokens: int) -> Place:
        """The place in the stream of that name now: the same one where its sequences are the same, else at its beginning.

        `epoch_tokens`: of the stream this is a place of, as far as known.
        """
        if digest == self.digest:
            return self
        return Place(0, digest, self.tokens_before + self.at, self.epochs_before + self.at / epoch_tokens)


@dataclass(frozen=True, slots=True)
class Segment:
    """Steps from `start` on with the same weights."""

    start: int
    batch_tokens: int
    shares: Mapping[str, Fraction]
    """Share of each stream in the tokens of a step; they sum to 1."""
    places: Mapping[str, Place]
    """Of every stream the run has had so far."""
    epoch_tokens: Mapping[str, int]
    """Tokens of one epoch of each of them."""

    def cursor(self, stream: str, step: int) -> int:
        """Tokens of the stream before step `step` (from 0, at least `start`)."""
        moved = (step - self.start) * self.batch_tokens * self.shares.get(stream, Fraction(0))
        return self.places[stream].at + moved.numerator // moved.denominator


@dataclass(frozen=True, slots=True)
class MixCourse:
    """The segments of a run so far, at least one."""

    segments: tuple[Segment, ...]

    def segment(self, step: int) -> Segment:
        """The segment that step `step` lies in; the first for any before it."""
        return next((segment for segment in reversed(self.segments) if segment.start <= step), self.segments[0])

    def before(self, step: int) -> MixCourse:
        """The segments that began before `step`: what later stages were to be says nothing. The first one where there is none."""
        return MixCourse(tuple(segment for segment in self.segments if segment.start < step) or self.segments[:1])

    def dump(self) -> list[dict[str, Any]]:
        """Plain values, for a checkpoint."""
        return [
            {
                "start": segment.start,
                "batch_tokens": segment.batch_tokens,
                "shares": {name: str(share) for name, share in segment.shares.items()},
                "places": {
                    name: [place.at, place.digest, place.tokens_before, place.epochs_before] for name, place in segment.places.items()
                },
                "epoch_tokens": dict(segment.epoch_tokens),
            }
            for segment in self.segments
        ]


def load_mix_course(saved: Sequence[Mapping[str, Any]] | None) -> MixCourse | None:
    """The inverse of `MixCourse.dump`; None where there is nothing."""
    if not saved:
        return None
    segments = (
        Segment(
            start=int(item["start"]),
            batch_tokens=int(item["batch_tokens"]),
            shares={name: Fraction(share) for name, share in item["shares"].items()},
            places={name: Place(*values) for name, values in item["places"].items()},
            epoch_tokens={name: int(tokens) for name, tokens in item["epoch_tokens"].items()},
        )
        for item in saved
    )
    return MixCourse(tuple(segments))


@dataclass(frozen=True, slots=True)
class MixSettings:
    """The mix that the configuration and the corpora make, by stream."""

    batch_tokens: int
    shares: Mapping[str, Fraction]
    digests: Mapping[str, str]
    epoch_tokens: Mapping[str, int]


def first_course(settings: MixSettings, start: int = 0) -> MixCourse:
    """The course of a run that begins its mix at step `start`."""
    places = {name: Place(0, digest) for name, digest in settings.digests.items()}
    return MixCourse((Segment(start, settings.batch_tokens, settings.shares, places, settings.epoch_tokens),))


def source_of(stream: str) -> str:
    """The source of a stream: `books` of `books:8192`, which has its documents from 8,192 tokens on."""
    return stream.partition(":")[0]


def _latest_streams(saved: MixCourse, done: int, source: str) -> set[str]:
    """Streams that a source had when it last had any."""
    for segment in reversed([segment for segment in saved.segments if segment.start <= done] or saved.segments[:1]):
        streams = {name for name in segment.shares if source_of(name) == source}
        if streams:
            return streams
    return set()


def _places(names: Mapping[str, str], reached: Mapping[str, Place], epoch_tokens: Mapping[str, int], latest: set[str]) -> dict[str, Place]:
    """Where the streams of one source (digests by name) go on. Classes of other lengths begin anew, and know what was seen before."""
    if not latest or latest == set(names):
        return {
            name: reached[name].on(digest, epoch_tokens[name]) if name in reached else Place(0, digest) for name, digest in names.items()
        }
    before = {name: reached[name] for name in latest if name in reached}
    seen = max((place.epochs_before + place.at / epoch_tokens[name] for name, place in before.items()), default=0.0)
    given = sum(place.tokens_before + place.at for place in before.values())
    first = min(names)
    return {name: Place(0, digest, given if name == first else 0, seen) for name, digest in names.items()}


def resumed_course(settings: MixSettings, saved: MixCourse | None, done: int) -> tuple[MixCourse, bool]:
    """The course after `done` steps of the course that a checkpoint holds, and whether a new segment begins there."""
    if saved is None:
        return first_course(settings, done), done > 0
    planned, saved = saved.segment(done), saved.before(done)
    last = saved.segment(done)
    names = settings.digests
    is_same = last.shares == settings.shares and last.batch_tokens == settings.batch_tokens
    if is_same and all(name in last.places and last.places[name].digest == digest for name, digest in names.items()):
        return saved, False
    reached = {name: replace(place, at=last.cursor(name, done)) for name, place in last.places.items()}
    places = dict(reached)
    for source in {source_of(name) for name in names}:
        own = {name: digest for name, digest in names.items() if source_of(name) == source}
        latest = _latest_streams(saved, done, source)
        # What is carried on to other streams is counted there from now on.
        places = {name: place for name, place in places.items() if name in own or name not in latest}
        places |= _places(own, reached, last.epoch_tokens, latest)
    epoch_tokens = {**last.epoch_tokens, **settings.epoch_tokens}
    segment = Segment(done, settings.batch_tokens, settings.shares, places, epoch_tokens)
    before = tuple(one for one in saved.segments if one.start < done)
    return MixCourse((*before, segment)), segment != planned
