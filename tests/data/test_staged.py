"""A run in stages: each step from its stage's own sequences, no document twice in an epoch, and the same after a resume anywhere."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from efflaunch.errors import DataError
from efflaunch.tests.data.corpora import write_corpus
from efflaunch.training.config import Objective, TrainConfig, TrainStage
from efflaunch.training.data.config import DataConfig, SourceConfig
from efflaunch.training.data.source import DataSource, open_data
from efflaunch.training.data.train_stages import check_stages, train_stages

STEPS = 12
STAGES = (
    TrainStage(steps=3, max_seq_len=30, global_batch_tokens=120),
    TrainStage(steps=4, max_seq_len=30, weights={"b": 3.0}),
    TrainStage(),
)
"""Short sequences in small batches; other shares in larger ones; longer sequences."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory, generator = tmp_path_factory.mktemp("stages"), np.random.default_rng(5)
    for name, number in (("a", 60), ("b", 60)):
        write_corpus(directory / name, [[1] * length for length in generator.integers(2, 80, number).tolist()])
    return directory


def open_stages(folder: Path, stages: Sequence[TrainStage] = STAGES, steps: int = STEPS, most: float | None = None) -> DataSource:
    sources = {name: SourceConfig(prefixes=[str(folder / name)], max_epochs=most) for name in "ab"}
    data = DataConfig(name="t", sources=sources, max_seq_len=60, global_batch_tokens=240)
    train = TrainConfig(steps=steps, stages=list(stages))
    check_stages(train, data)
    return open_data(data, 0, 100, Objective.LANGUAGE_MODELLING, train_stages(train, data))


def sequences(source: DataSource, steps: range) -> list[list[tuple[int, int, int, int]]]:
    """(corpus, document, start, stop) of the sequences of each step."""
    def columns(step: int, index: int) -> tuple[int, int, int, int]:
        one = source.sequence(step, index)
        return one.corpus, one.document, one.start, one.stop

    return [[columns(step, index) for index in range(len(source.lengths(step)))] for step in steps]


def test_each_step_is_of_its_stage(folder: Path) -> None:
    source = open_stages(folder)
    assert [source.stage(step) for step in range(STEPS)] == [1] * 3 + [2] * 4 + [3] * 5
    longest = [max(source.lengths(step)) for step in range(STEPS)]
    assert max(longest[:7]) == 30 and max(longest[7:]) == 60
    tokens = [sum(source.lengths(step)) for step in range(STEPS)]
    assert abs(sum(tokens[:3]) - 3 * 120) <= 60 and abs(sum(tokens[3:7]) - 4 * 240) <= 60
    given = {use.name: use.tokens for use in source.usage(7)}
    assert abs(given["b"] - (180 + 720)) <= 30
    # Where sequences are others, tokens that were given out before count by the cursor: to within a sequence.
    assert abs(sum(use.tokens for use in source.usage(STEPS)) - sum(tokens)) <= 60
    assert "stage 2, steps 4 to 7, sequences up to 30, 240 tokens a step, a 25.0 % of the tokens, b 75.0 %" in source.summary()


def test_no_sequence_comes_twice_in_an_epoch_over_a_change_of_stage(folder: Path) -> None:
    """The first two stages cut documents alike, so they go through the same epochs."""
    source = open_stages(folder, [TrainStage(steps=3, max_seq_len=30), TrainStage(max_seq_len=30, weights={"b": 2.0})], steps=8)
    seen = [one for step in sequences(source, range(8)) for one in step]
    assert max(use.epochs for use in source.usage(8)) < 1 and len(set(seen)) == len(seen)


@settings(max_examples=STEPS + 1, deadline=None)
@given(st.integers(0, STEPS))
def test_a_resume_in_any_stage_goes_on(folder: Path, done: int) -> None:
    source, resumed = open_stages(folder), open_stages(folder)
    assert source.resume_mix(None, 0, STEPS) is None
    assert resumed.resume_mix(source.mix_state(), done, STEPS) is None
    assert sequences(resumed, range(STEPS)) == sequences(source, range(STEPS))
    assert resumed.mix_state() == source.mix_state()


def test_stages_that_are_changed_or_left_out_on_the_way(folder: Path) -> None:
    source = open_stages(folder)
    longer = open_stages(folder, (*STAGES[:2], TrainStage(weights={"a": 0.0})), steps=20)
    assert longer.resume_mix(source.mix_state(), 5, 20) is None
    assert sequences(longer, range(7)) == sequences(source, range(7))
    assert {one[0] for step in sequences(longer, range(7, 20)) for one in step} == {1}
    other = open_stages(folder, [TrainStage(max_seq_len=30, weights={"a": 2.0})])
    line = other.resume_mix(source.mix_state(), 5, STEPS)
    assert line is not None and line.startswith("data.sources from step 6 on: stage 1") and "a 66.7 %" in line
    # What later stages were to be is forgotten; what was seen is not.
    before = {one for step in sequences(source, range(5)) for one in step}
    assert not before & {one for step in sequences(other, range(5, 7)) for one in step}


def test_a_source_that_a_stage_exhausts_is_named(folder: Path) -> None:
    heavy = [TrainStage(steps=3, max_seq_len=30), TrainStage(max_seq_len=30, weights={"b": 99.0})]
    with pytest.raises(DataError, match=r"data.sources.b.max_epochs: .* exhausted after step \d+"):
        open_stages(folder, heavy, steps=60, most=1.0).resume_mix(None, 0, 60)
    assert open_stages(folder, heavy, steps=8, most=1.0).resume_mix(None, 0, 8) is None


def test_a_run_without_stages_has_none(folder: Path) -> None:
    assert open_stages(folder, ()).stage(3) is None
