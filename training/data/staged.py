"""Gives each step of a run in stages its sequences: a mix for each stage, and one course through all of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from .mix import MixedSampler, SourceUse
from .mix_course import MixCourse, resumed_course
from .sampler import SequenceTable
from .train_stages import Stage


@dataclass(frozen=True, slots=True)
class StageMix:
    """A stage and the sampler of its mix."""

    stage: Stage
    sampler: MixedSampler


def in_one_table(tables: Mapping[int, SequenceTable], mixes: Sequence[StageMix]) -> tuple[SequenceTable, list[StageMix]]:
    """The tables, by their max_seq_len, one behind the other, and the mixes with rows that count in it."""
    offsets, base = {}, 0
    for length, table in sorted(tables.items()):
        offsets[length], base = base, base + len(table)
    ordered = [table for _, table in sorted(tables.items())]
    whole = SequenceTable(
        corpus=np.concatenate([table.corpus for table in ordered]),
        document=np.concatenate([table.document for table in ordered]),
        start=np.concatenate([table.start for table in ordered]),
        stop=np.concatenate([table.stop for table in ordered]),
        num_too_short=max(table.num_too_short for table in ordered),
        num_dropped=max(table.num_dropped for table in ordered),
        num_truncated=max(table.num_truncated for table in ordered),
    )
    moved = []
    for mix in mixes:
        offset = offsets[mix.stage.data.max_seq_len]
        streams = [replace(stream, rows=stream.rows + offset) for stream in mix.sampler.streams]
        sampler = MixedSampler(whole, streams, mix.sampler.seed, mix.sampler.batch_tokens, mix.stage.key)
        moved.append(StageMix(mix.stage, sampler))
    return whole, moved


class StagedSampler:
    """The steps of every stage, from its own mix.

    A stage begins in each stream where the one before it left off, as a resume with other weights does (mix_course.py): streams whose
    sequences are the same go on, those of another max_seq_len begin anew.
    """

    def __init__(self, mixes: Sequence[StageMix], seed: int) -> None:
        """`mixes` of all stages, at least one, in their order."""
        self._mixes, self.seed = list(mixes), seed
        self.batch_tokens = max(mix.sampler.batch_tokens for mix in mixes)
        self.epoch_tokens = max(mix.sampler.epoch_tokens for mix in mixes)
        self.course: MixCourse
        self.resume(None, 0)

    def _at(self, step: int) -> StageMix:
        return next((mix for mix in self._mixes if step < mix.stage.stop), self._mixes[-1])

    def stage(self, step: int) -> Stage:
        """The stage of step `step`, counted from 0."""
        return self._at(step).stage

    def step(self, step: int) -> np.ndarray:
        """Indices (int64) into the table of the sequences of a step, counted from 0. DataError as of MixedSampler."""
        return self._at(step).sampler.step(step)

    def resume(self, saved: Sequence[Mapping[str, Any]] | None, done: int) -> bool:
        """Go on after `done` steps of a course that a checkpoint has; whether the mix is another from here on than was planned then."""
        now = self._at(done)
        is_new = now.sampler.resume(saved, done)
        course = now.sampler.course
        for mix in self._mixes:
            if mix.stage.start > done:
                course, _ = resumed_course(mix.sampler.settings, course, mix.stage.start)
        self.course, self._done = course, done
        for mix in self._mixes:
            mix.sampler.course = course
        return is_new

    def describe(self) -> str:
        """What each stage is: steps, length, batch and shares."""
        return "; ".join(
            f"stage {mix.stage.number}, steps {mix.stage.start + 1:,} to {mix.stage.stop:,}, sequences up to "
            f"{mix.stage.data.max_seq_len:,}, {mix.sampler.batch_tokens:,} tokens a step, {mix.sampler.describe()}"
            for mix in self._mixes
        )

    def usage(self, step: int) -> list[SourceUse]:
        """What was given out of each source before step `step`, counted from 0."""
        return self._at(max(step - 1, 0)).sampler.usage(step)

    def check_epochs(self, steps: int) -> None:
        """Raise DataError for a source that is seen more often than its max_epochs in a stage that is not over yet."""
        for mix in self._mixes:
            if mix.stage.stop > self._done or mix is self._mixes[-1]:
                mix.sampler.check_epochs(min(mix.stage.stop, steps))
