"""Lengths of sequences to plan for: published distributions, a corpus index, or a file of numbers.

    wikipedia                   by the quantiles of a million documents
    commoncrawl, github         log-normal surrogates
    lognormal:MEDIAN:SIGMA      one of your own, `lognormal:4K:1.2`
    PREFIX.idx                  documents of an indexed corpus, cut at max_seq_len as training cuts them
    FILE                        whole numbers (`8192`, `8K`) separated by white space or commas

Note: Wikipedia
    Quantiles of the million lengths FlexSP (arXiv 2412.01523) publishes. Between two of them the logarithm of the length is
    linear in the normal score, so a log-normal piece joins each pair and the quantiles come out exactly.

Note: CommonCrawl and GitHub
    The files behind the paper's other two corpora are not public. LogNormal(ln 1300, 1.6) and LogNormal(ln 1000, 1.8) with
    draws over 384K dropped give the paper's mean lengths and, in its own cost model, its speedups.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ...errors import ConfigError, DataError
from ...units import format_tokens, parse_quantity

if TYPE_CHECKING:
    import numpy as np

WIKIPEDIA_QUANTILES = (
    (0.10, 87), (0.50, 347), (0.75, 862), (0.90, 2_112), (0.95, 3_721),
    (0.99, 10_921), (0.999, 37_367), (0.9999, 102_060), (1 - 1e-6, 1_820_000),
)  # fmt: skip
"""Pairs (share of documents, their most tokens); the last is the longest of a million."""
SURROGATES = {"commoncrawl": (1300.0, 1.6), "github": (1000.0, 1.8)}
"""Median tokens and sigma of the logarithm."""
DISTRIBUTIONS = ("wikipedia", *SURROGATES)
SHORTEST = 2
"""Tokens of the shortest sequence that has something to predict."""
_LEAST_ACCEPTED = 1e-3

Draw = Callable[["np.random.Generator", int], "np.ndarray"]


@dataclass(frozen=True, slots=True)
class LengthSource:
    """Where lengths come from. `whole` holds every length of a file or corpus; a distribution has none and is drawn from."""

    name: str
    max_seq_len: int
    whole: np.ndarray | None
    _draw: Draw | None = None

    def draw(self, count: int, seed: int) -> np.ndarray:
        """`count` lengths (int64), the same for the same seed; a file is dealt out like shuffled cards, epoch after epoch."""
        import numpy as np

        if count < 1:
            raise ConfigError("--sequences", found=str(count), expected="1 or more", hint="--sequences 512")
        generator = np.random.default_rng(seed)
        if self.whole is not None:
            epochs = [generator.permutation(self.whole) for _ in range(-(-count // len(self.whole)))]
            return np.concatenate(epochs)[:count]
        return self._accepted(generator, count)

    def draw_tokens(self, num_tokens: int, seed: int) -> np.ndarray:
        """Lengths (int64) of a step: as many sequences as start before `num_tokens` tokens are there, at least one."""
        import numpy as np

        count = 64
        while True:
            lengths = self.draw(count, seed)
            if int(lengths.sum()) >= num_tokens:
                starts = np.cumsum(lengths) - lengths
                return lengths[: max(1, int(np.searchsorted(starts, num_tokens)))]
            count *= 2

    def _accepted(self, generator: np.random.Generator, count: int) -> np.ndarray:
        """Draws over the limit are dropped. Blocks of one size, so that more of a seed begins with what fewer were."""
        import numpy as np

        assert self._draw is not None
        kept: list[np.ndarray] = []
        num_accepted = tried = 0
        while num_accepted < count:
            block = self._draw(generator, 4096)
            accepted = block[block <= self.max_seq_len]
            kept.append(accepted)
            num_accepted, tried = num_accepted + len(accepted), tried + len(block)
            if num_accepted < tried * _LEAST_ACCEPTED:
                raise ConfigError(
                    "data.max_seq_len",
                    found=f"{self.max_seq_len}, which fewer than one in a thousand sequences of {self.name} keep to",
                    expected="a limit most sequences are under",
                    hint="data.max_seq_len=8K, or another --lengths",
                )
        return np.concatenate(kept)[:count]


def open_lengths(text: str, *, max_seq_len: int) -> LengthSource:
    """The source `text` names; see the top of this file for what it may say."""
    name, *arguments = text.split(":")
    key = name.strip().lower()
    if key == "wikipedia" and not arguments:
        return LengthSource(key, max_seq_len, None, _draw_wikipedia)
    if key in SURROGATES and not arguments:
        return LengthSource(key, max_seq_len, None, _log_normal(*SURROGATES[key]))
    if key == "lognormal":
        return LengthSource(text, max_seq_len, None, _log_normal(*_parameters(text, arguments)))
    path = Path(text)
    if path.suffix == ".idx":
        return LengthSource(text, max_seq_len, _corpus_lengths(text, max_seq_len))
    if not path.is_file():
        raise ConfigError(
            "--lengths",
            found=f"{text!r}, which is no file",
            expected=f"{', '.join(DISTRIBUTIONS)}, lognormal:MEDIAN:SIGMA, PREFIX.idx or a file of lengths",
            hint="--lengths wikipedia",
        )
    return LengthSource(text, max_seq_len, _file_lengths(path, max_seq_len))


def _draw_wikipedia(generator: np.random.Generator, count: int) -> np.ndarray:
    from statistics import NormalDist

    import numpy as np

    # The lowest point keeps the slope of the first piece down to the shortest sequence.
    knots = [(-5.0, math.log(SHORTEST)), *((NormalDist().inv_cdf(share), math.log(most)) for share, most in WIKIPEDIA_QUANTILES)]
    scores, logarithms = zip(*knots, strict=True)
    return _whole(np.exp(np.interp(generator.standard_normal(count), scores, logarithms)))


def _log_normal(median: float, sigma: float) -> Draw:
    def draw(generator: np.random.Generator, count: int) -> np.ndarray:
        return _whole(generator.lognormal(math.log(median), sigma, count))

    return draw


def _whole(lengths: np.ndarray) -> np.ndarray:
    import numpy as np

    # Anything beyond 2^53 is over every limit; clipped, it still is.
    return np.clip(np.rint(lengths), SHORTEST, 2**53).astype(np.int64)


def _parameters(text: str, arguments: list[str]) -> tuple[float, float]:
    try:
        median, sigma = arguments
        values = float(parse_quantity(median, "tokens")), float(sigma)
    except ValueError:
        values = (0.0, 0.0)
    if values[0] < 1 or not 0 < values[1] < 10:
        raise ConfigError(
            "--lengths",
            found=repr(text),
            expected="lognormal:MEDIAN:SIGMA, tokens and a number up to 10",
            hint="--lengths lognormal:4K:1.2",
        )
    return values


def _corpus_lengths(path: str, max_seq_len: int) -> np.ndarray:
    import numpy as np

    from .indexed import read_index
    from .sampler import SequenceTable

    documents = np.diff(read_index(path).starts)
    lengths = SequenceTable.from_lengths([documents], max_seq_len=max_seq_len, split=True).lengths
    if len(lengths) == 0:
        raise _unusable(path, "no document of two tokens or more", "something to train on", "another corpus")
    return lengths


def _file_lengths(path: Path, max_seq_len: int) -> np.ndarray:
    import numpy as np

    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise _unusable(str(path), str(error), "a text file of whole numbers", "one length a line, or PREFIX.idx of a corpus") from error
    lengths = [
        _length(word, f"{path} line {number}", max_seq_len)
        for number, line in enumerate(lines, 1)
        for word in line.replace(",", " ").split()
    ]
    if not lengths:
        raise _unusable(str(path), "no number", "at least one length", "one length a line")
    return np.array(lengths, dtype=np.int64)


def _length(word: str, where: str, max_seq_len: int) -> int:
    try:
        # A sign is not part of a quantity; a negative length deserves the message for lengths.
        value = -1 if word.startswith("-") else int(parse_quantity(word, "tokens"))
    except ValueError as error:
        raise _unusable(where, repr(word), "a whole number of tokens, like 8192 or 8K", "one length a line") from error
    if value < 1:
        raise _unusable(where, f"a sequence of {word} tokens", "1 or more", "leave it out")
    if value > max_seq_len:
        raise _unusable(
            where,
            f"a sequence of {value} tokens",
            f"at most data.max_seq_len={format_tokens(max_seq_len)}",
            f"data.max_seq_len={format_tokens(value).replace(',', '')}",
        )
    return value


def _unusable(where: str, actual: str, expected: str, hint: str) -> DataError:
    return DataError(where, found=actual, expected=expected, hint=hint)
