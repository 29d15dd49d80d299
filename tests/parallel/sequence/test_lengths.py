"""Lengths to plan for: published numbers of the distributions, files, corpora, and everything that can be wrong with them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from efflaunch.errors import ConfigError, DataError
from efflaunch.tests.data.corpora import write_corpus
from efflaunch.training.data.lengths import DISTRIBUTIONS, WIKIPEDIA_QUANTILES, open_lengths

MANY = 400_000


def draws(name: str, limit: int) -> np.ndarray:
    return open_lengths(name, max_seq_len=limit).draw(MANY, 7)


def test_wikipedia_has_its_quantiles() -> None:
    lengths = draws("wikipedia", 1_820_000)
    for share, most in WIKIPEDIA_QUANTILES[:7]:
        # Four standard errors of the share that lies below the quantile.
        assert abs(np.mean(lengths <= most) - share) < 4 * np.sqrt(share * (1 - share) / MANY) + 1e-3, share
    assert lengths.max() <= 1_820_000


def test_wikipedia_has_its_published_tail() -> None:
    """Mean 1,014; 98.4 % of sequences and 72.5 % of tokens in sequences up to 8K; 0.13 % and 7.6 % beyond 32K."""
    lengths = draws("wikipedia", 1_820_000)
    assert lengths.mean() == pytest.approx(1014, rel=0.05)
    short, long = lengths <= 8192, lengths > 32768
    assert short.mean() == pytest.approx(0.984, abs=0.002) and lengths[short].sum() / lengths.sum() == pytest.approx(0.725, abs=0.02)
    assert long.mean() == pytest.approx(0.0013, abs=0.0003) and lengths[long].sum() / lengths.sum() == pytest.approx(0.076, abs=0.02)


def parse_lengths(text: str, *, count: int | None, seed: int, max_seq_len: int) -> np.ndarray:
    """Lengths of one step; count None: every one a file holds, in order."""
    source = open_lengths(text, max_seq_len=max_seq_len)
    lengths = source.whole if count is None else source.draw(count, seed)
    assert lengths is not None
    return lengths


@pytest.mark.parametrize(("name", "low", "high"), [("commoncrawl", 4300, 4800), ("github", 4500, 5000)])
def test_surrogates_have_the_mean_of_the_paper(name: str, low: int, high: int) -> None:
    lengths = draws(name, 384_000)
    assert low < lengths.mean() < high and lengths.max() <= 384_000


def test_a_log_normal_of_ones_own() -> None:
    lengths = draws("lognormal:4K:0.5", 1 << 30)
    assert np.median(lengths) == pytest.approx(4096, rel=0.01) and np.log(lengths).std() == pytest.approx(0.5, rel=0.01)


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_a_seed_means_the_same_lengths_and_more_of_them_begin_alike(name: str) -> None:
    first, repeated, more = (parse_lengths(name, count=count, seed=3, max_seq_len=8192) for count in (500, 500, 9000))
    assert np.array_equal(first, repeated) and np.array_equal(more[:500], first) and first.dtype == np.int64
    assert not np.array_equal(first, parse_lengths(name, count=500, seed=4, max_seq_len=8192))
    assert more.min() >= 2 and more.max() <= 8192


@given(tokens=st.integers(1, 200_000), seed=st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_a_step_holds_the_sequences_that_start_in_it(tokens: int, seed: int) -> None:
    lengths = open_lengths("wikipedia", max_seq_len=65536).draw_tokens(tokens, seed)
    assert lengths[:-1].sum() < tokens <= lengths.sum()


def test_a_file_is_read_whole_or_dealt_out(tmp_path: Path) -> None:
    path = tmp_path / "lengths.txt"
    path.write_text("512 1K\n2048, 7\n\n100\n")
    assert parse_lengths(str(path), count=None, seed=0, max_seq_len=4096).tolist() == [512, 1024, 2048, 7, 100]
    dealt = parse_lengths(str(path), count=10, seed=0, max_seq_len=4096)
    assert sorted(dealt[:5].tolist()) == sorted(dealt[5:].tolist()) == [7, 100, 512, 1024, 2048]
    assert parse_lengths(str(path), count=3, seed=0, max_seq_len=4096).tolist() == dealt[:3].tolist()


def test_a_corpus_is_cut_as_training_cuts_it(tmp_path: Path) -> None:
    prefix = tmp_path / "c"
    write_corpus(prefix, [list(range(length)) for length in (5, 1, 23, 10)])
    assert parse_lengths(f"{prefix}.idx", count=None, seed=0, max_seq_len=10).tolist() == [5, 10, 10, 3, 10]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "found no number"),
        ("12\nten", "line 2: found 'ten'; expected a whole number of tokens"),
        ("12\n0", "line 2: found a sequence of 0 tokens; expected 1 or more"),
        ("-5", "line 1: found a sequence of -5 tokens; expected 1 or more"),
        ("1.5", "line 1: found '1.5'"),
        ("9000", "line 1: found a sequence of 9000 tokens; expected at most data.max_seq_len=8K.\n  Try: data.max_seq_len=9000"),
    ],
)
def test_files_that_cannot_be_used(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "lengths.txt"
    path.write_text(content)
    with pytest.raises(DataError) as caught:
        parse_lengths(str(path), count=None, seed=0, max_seq_len=8192)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("text", "count", "limit", "message"),
    [
        ("wikipedai", 5, 8192, "--lengths: found 'wikipedai', which is no file; expected wikipedia, commoncrawl, github"),
        ("lognormal:4K", 5, 8192, "expected lognormal:MEDIAN:SIGMA"),
        ("lognormal:4K:-1", 5, 8192, "expected lognormal:MEDIAN:SIGMA"),
        ("wikipedia", 0, 8192, "--sequences: found 0"),
        ("lognormal:64K:0.1", 5, 16, "fewer than one in a thousand"),
    ],
)
def test_texts_that_mean_nothing(text: str, count: int | None, limit: int, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_lengths(text, count=count, seed=0, max_seq_len=limit)
    assert message in str(caught.value)


def test_a_binary_file_is_no_list_of_lengths(tmp_path: Path) -> None:
    (tmp_path / "x.npy").write_bytes(b"\x93NUMPY\xff\xfe")
    with pytest.raises(DataError, match="text file of whole numbers"):
        parse_lengths(str(tmp_path / "x.npy"), count=None, seed=0, max_seq_len=8192)
