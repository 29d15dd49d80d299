"""A mix of sources: shares that converge, no document twice in an epoch, a pure function of (seed, step), and what is refused."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from efflaunch.errors import ConfigError, DataError
from efflaunch.tests.data.corpora import write_corpus
from efflaunch.training.data.config import DataConfig, LongDocuments, SourceConfig, check_sources
from efflaunch.training.data.mix import MixedSampler
from efflaunch.training.data.source import DataSource, open_data

LONGEST = 60


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three corpora of unequal documents."""
    directory, generator = tmp_path_factory.mktemp("mix"), np.random.default_rng(5)
    for name, number in (("a", 40), ("b", 25), ("c", 60)):
        write_corpus(directory / name, [[1] * length for length in generator.integers(2, LONGEST, number).tolist()])
    return directory


def config_of(folder: Path, batch: int = 240, **weights: float | SourceConfig) -> DataConfig:
    sources = {
        name: SourceConfig(prefixes=[str(folder / name)], weight=given) if isinstance(given, (int, float)) else given
        for name, given in weights.items()
    }
    return DataConfig(name="t", sources=sources, max_seq_len=LONGEST, global_batch_tokens=batch)


def open_mix(folder: Path, *, seed: int = 0, batch: int = 240, **weights: float | SourceConfig) -> DataSource:
    return open_data(config_of(folder, batch, **weights), seed, 100)


def documents(source: DataSource, steps: range) -> list[tuple[str, int]]:
    """(source, document) of each sequence of some steps."""
    out = []
    for step in steps:
        for index in range(len(source.lengths(step))):
            out.append((source.source_names[source.source_of(step, index)], source.sequence(step, index).document))
    return out


@settings(max_examples=25, deadline=None)
@given(st.tuples(*[st.integers(0, 9)] * 3).filter(lambda weights: sum(weights) and max(weights) * 4 >= sum(weights)), st.integers(0, 9))
def test_shares_converge_and_steps_are_never_empty(folder: Path, weights: tuple[int, int, int], seed: int) -> None:
    named = dict(zip("abc", weights, strict=True))
    source, steps = open_mix(folder, seed=seed, batch=4 * LONGEST, **named), 50
    tokens = Counter({name: 0 for name in named})
    for step in range(steps):
        assert source.lengths(step)
        for index, length in enumerate(source.lengths(step)):
            tokens[source.source_names[source.source_of(step, index)]] += length
    for use in source.usage(steps):
        assert use.tokens == tokens[use.name]
        assert use.share == tokens[use.name] / sum(tokens.values())
        assert abs(tokens[use.name] - steps * 4 * LONGEST * named[use.name] / sum(weights)) <= LONGEST


def test_no_document_twice_in_an_epoch(folder: Path) -> None:
    source = open_mix(folder, a=1, b=2, c=1)
    steps = next(step for step in range(1000) if any(use.name == "b" and use.epochs >= 3 for use in source.usage(step)))
    seen = [document for name, document in documents(source, range(steps)) if name == "b"]
    number = len(set(seen))
    for first in range(0, len(seen) - number + 1, number):
        assert len(set(seen[first : first + number])) == number


def test_it_depends_on_seed_and_step_alone(folder: Path) -> None:
    source = open_mix(folder, a=1, b=2, c=3)
    order = [source.lengths(step) for step in range(20)]
    again = open_mix(folder, c=3, b=2, a=1)
    assert [again.lengths(step) for step in reversed(range(20))] == order[::-1]
    assert [open_mix(folder, seed=1, a=1, b=2, c=3).lengths(step) for step in range(20)] != order
    # Each source is shuffled by itself: what another weighs does not change its order.
    alone, mixed = (documents(open_mix(folder, **weights), range(12)) for weights in ({"a": 1}, {"a": 1, "b": 1}))
    mine = [pair for pair in mixed if pair[0] == "a"]
    assert mine == alone[: len(mine)]


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 12), st.integers(1, 9), st.integers(1, 9))
def test_changed_weights_repeat_no_document_and_leave_none_out(folder: Path, done: int, first: int, second: int) -> None:
    before, after = open_mix(folder, a=first, c=second), open_mix(folder, a=second, c=first)
    assert before.resume_mix(None, 0, 100) is None
    line = after.resume_mix(before.mix_state(), done, 100)
    assert (line is None) == (first == second)
    together = documents(before, range(done)) + documents(after, range(done, done + 6))
    for name in "ac":
        # As the source's own stream has them, alone.
        alone = [document for _, document in documents(open_mix(folder, **{name: 1}), range(25))]
        mine = [document for owner, document in together if owner == name]
        assert mine == alone[: len(mine)]
    # Steps before the change stay what they were, for who explains them.
    assert documents(after, range(done)) == documents(before, range(done))


def test_steps_of_before_a_change_of_sources(folder: Path) -> None:
    before = open_mix(folder, a=1, b=1)
    more, other = open_mix(folder, a=1, b=1, c=1), open_mix(folder, a=1, c=1)
    for after in (more, other):
        after.resume_mix(before.mix_state(), 4, 100)
        assert after.usage(4)[-1].tokens == 0 and after.lengths(4)
        assert [use.name for use in after.usage(5)] == list(after.source_names)
    assert documents(more, range(4)) == documents(before, range(4))
    with pytest.raises(DataError, match=r"step 2: found a mix in which b had other documents, or was there"):
        other.lengths(1)


def test_long_documents_are_seen_more_often(folder: Path) -> None:
    plain = open_mix(folder, a=1, b=1)
    weighed = SourceConfig(prefixes=[str(folder / "a")], length_weights={"20": 2.0, "40": 6.0})
    source = open_mix(folder, a=weighed, b=1)
    steps = 200
    lengths = source.corpora[0].lengths
    natural = [int(lengths[(lengths >= low) & (lengths < high)].sum()) for low, high in ((0, 20), (20, 40), (40, 999))]
    due = np.array(natural) * (1, 2, 6) / np.dot(natural, (1, 2, 6))
    found = np.zeros(3)
    for name, document in documents(source, range(steps)):
        if name == "a":
            found[np.searchsorted((20, 40), lengths[document], side="right")] += lengths[document]
    np.testing.assert_allclose(found / found.sum(), due, atol=0.005)
    # The source's own share stays, and its epochs are those of what is seen most.
    used, other = source.usage(steps)[0], plain.usage(steps)[0]
    assert abs(used.share - 0.5) < 0.005 and used.epochs > 1.3 * other.epochs


def test_pieces_belong_to_the_class_of_their_document(tmp_path: Path) -> None:
    write_corpus(tmp_path / "a", [[1] * 10] * 6 + [[1] * 200] * 3)
    source = open_mix(tmp_path, a=SourceConfig(prefixes=[str(tmp_path / "a")], length_weights={"100": 0.0}))
    assert {document for _, document in documents(source, range(5))} == set(range(6))


def test_a_step_that_could_be_empty_is_refused(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"(?s)data.global_batch_tokens: .*share of one source .*=\d+") as error:
        open_mix(folder, batch=LONGEST, a=1, b=1)
    needed = int(str(error.value.hint).partition("=")[2].split(",")[0])
    source = open_mix(folder, batch=needed, a=1, b=1)
    assert all(source.lengths(step) for step in range(100))


def test_a_source_that_is_exhausted_says_when(folder: Path) -> None:
    source = open_mix(folder, a=SourceConfig(prefixes=[str(folder / "a")], max_epochs=2), b=3)
    steps = next(step for step in range(10_000) if source.usage(step)[0].epochs >= 2)
    with pytest.raises(DataError, match=rf"data.sources.a.max_epochs: found .* exhausted after step ({steps - 1}|{steps})\.") as error:
        source.resume_mix(None, 0, steps + 1)
    assert "train.steps" in str(error.value.hint)
    assert source.resume_mix(None, 0, steps - 1) is None


def test_without_sources_there_is_nothing_to_say(folder: Path) -> None:
    config = DataConfig(name="t", prefixes=[str(folder / "a")], max_seq_len=LONGEST, global_batch_tokens=240)
    source = open_data(config, 0, 100)
    assert (source.usage(3), source.mix_state(), source.resume_mix(None, 2, 9), source.source_names) == ([], None, None, ())


def test_a_source_without_a_sequence_is_named(tmp_path: Path, folder: Path) -> None:
    write_corpus(tmp_path / "long", [[1] * 300])
    long = SourceConfig(prefixes=[str(tmp_path / "long")])
    with pytest.raises(DataError, match=r"data.sources.long: found no sequence"):
        open_data(replace(config_of(folder, a=1, long=long), long_documents=LongDocuments.DROP), 0, 100)
    only = SourceConfig(prefixes=[str(folder / "a")], length_weights={"2": 0.0, "1000": 1.0})
    with pytest.raises(DataError, match=r"data.sources.a.length_weights: found a weight of 0 for every document"):
        open_mix(folder, a=only)


WRONG: dict[str, dict[str, Any]] = {
    "data.sources: found 2 weights of 0": {"a": 0, "b": 0},
    "data.sources: found the name 'x y'": {"x y": 1},
    "data.sources.a.prefixes: found none": {"a": SourceConfig(prefixes=[])},
    "data.sources.b.prefixes: found c, which a has": {"a": SourceConfig(prefixes=["c"]), "b": SourceConfig(prefixes=["c"])},
    "data.sources.a.length_weights: found the length 'long'": {"a": SourceConfig(prefixes=["a"], length_weights={"long": 2.0})},
    "data.sources.a.length_weights: found weights of 0 alone": {"a": SourceConfig(prefixes=["a"], length_weights={"0": 0.0})},
}


@pytest.mark.parametrize("message", WRONG)
def test_what_makes_no_mix_is_refused(folder: Path, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        check_sources(config_of(folder, **WRONG[message]))
    assert message in str(error.value)


def test_one_kind_of_data_is_given(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"data: found prefixes and sources"):
        open_data(replace(config_of(folder, a=1), prefixes=["x"]), 0, 100)


def test_the_sampler_describes_its_shares(folder: Path) -> None:
    source = open_mix(folder, a=1, b=2, c=1)
    assert isinstance(source.sampler, MixedSampler)
    assert source.sampler.describe() == "a 25.0 % of the tokens, b 50.0 %, c 25.0 %"
    assert "b 50.0 %" in source.summary()
