"""Makes the texts of `eval.needles` into windows of tokens, and adds up what the model finds in them. Numpy only; no torch."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ...errors import ConfigError, DataError
from ...units import format_tokens
from ..data.config import DataConfig
from ..data.indexed import IndexedCorpus, Kind
from .config import NEEDLES, EvalConfig, length_name
from .corpus import WindowSource
from .needle_config import NeedleConfig
from .needle_texts import FILL, NeedleTask, NeedleText, needle_text
from .windows import Windows

_MEASURED, _NEARLY = 64, 0.99
"""Sentences by which a sentence's tokens are measured, and share of the room that they are let fill: most texts are tokenised once."""


@dataclass(frozen=True, slots=True)
class Cell:
    """What a text is of."""

    task: NeedleTask
    length: int
    depth: float


class TextCorpus(IndexedCorpus):
    """Documents that lie in memory, not in files."""

    def __init__(self, name: str, documents: list[np.ndarray]) -> None:
        """`documents`: token ids of each, int64."""
        self.prefix = name
        self.lengths = self.stored_lengths = np.array([len(document) for document in documents], dtype=np.int64)
        self._starts = np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(self.lengths)])
        self._tokens = np.concatenate(documents)
        self.metadata, self.kind, self.learns_all = None, Kind.DOCUMENTS, False
        self._mask = self._first_parts = self._scalars = None


@dataclass(frozen=True, slots=True)
class NeedleSet:
    """All texts: document i of the corpus is of `cells[i]`; its targets that count are the answer's tokens."""

    corpus: TextCorpus
    cells: tuple[Cell, ...]
    first: np.ndarray
    """Of each document, the position that predicts the answer's first token; int64."""

    def source(self, batch_tokens: int, vocab_size: int) -> WindowSource:
        """The texts in order, in steps of about `batch_tokens`."""
        numbers = np.arange(len(self.cells), dtype=np.int64)
        windows = Windows(numbers, np.zeros_like(numbers), self.corpus.lengths, self.first)
        return WindowSource(self.corpus, windows, batch_tokens, vocab_size)


class Writer:
    """Makes texts into tokens with a tokenizer that is known to have every character of them."""

    def __init__(self, tokenizer: str | None) -> None:
        """ConfigError for none, or for one that cannot write the sentences around needles."""
        if tokenizer is None:
            raise ConfigError(
                "eval.needles", found="no tokenizer", expected="the one the texts are to be made with", hint="data.tokenizer=DIRECTORY"
            )
        from ..data.tokenizer import load_tokenizer

        self.name, self._backend = tokenizer, load_tokenizer(tokenizer).backend_tokenizer
        self._backend.no_truncation()
        self._backend.no_padding()
        self._unknown = _unknown_ids(self._backend)
        self.check(" ".join(FILL))

    def tokens(self, text: NeedleText) -> tuple[np.ndarray, int]:
        """Ids (int64) up to the answer's end, and the first one of the answer: the first with any of its characters."""
        encoding = self._backend.encode(text.question + text.answer)
        starts = len(text.question)
        # Special tokens that are put around the text have no characters.
        inside = [index for index, (_, stop) in enumerate(encoding.offsets) if stop > starts]
        return np.array(encoding.ids[: inside[-1] + 1], dtype=np.int64), inside[0]

    def least(self, task: NeedleTask, length: int, depth: float, seed: tuple[object, ...]) -> tuple[np.ndarray, int]:
        """The `tokens` of a text with nothing around its needles; ConfigError where it cannot be written, or not in `length` tokens."""
        text = needle_text(task, 0, depth, *seed)
        self.check(text.question + text.answer)
        ids, begin = self.tokens(text)
        if len(ids) > length:
            raise ConfigError(
                "eval.needles.lengths",
                found=format_tokens(length),
                expected=f"room for the needles and the question of {task.value}: {len(ids)} tokens with this tokenizer",
                hint=f"eval.needles.lengths=[{-(-len(ids) // 64) * 64}], or fewer eval.needles.tasks",
            )
        return ids, begin

    def check(self, text: str) -> None:
        """ConfigError that names what the tokenizer leaves out of the text, or has no token of its own for."""
        lost = self._lost(text)
        if lost:
            raise ConfigError(
                "eval.needles",
                found=f"tokenizer {self.name}, which cannot write {', '.join(map(repr, lost[:5]))}{', ...' * (len(lost) > 5)}",
                expected="tokens for every word, number and sign of English texts",
                hint="data.tokenizer=DIRECTORY of the model's own tokenizer, or eval.needles.lengths=[]",
            )

    def _lost(self, text: str) -> list[str]:
        """What of a text is lost: of a vocabulary of words those, else characters; [] where nothing is."""
        if self._writes(text):
            return []
        words, characters = list(dict.fromkeys(text.split())), list(dict.fromkeys("".join(text.split())))
        of_words = type(self._backend.model).__name__ == "WordLevel"
        for parts in (words,) if of_words else (characters, words):
            lost = [part for part in parts if not self._writes(part)]
            if lost:
                return lost
        return [text]

    def _writes(self, text: str) -> bool:
        """Whether every character but spaces is of a known token."""
        try:
            encoding = self._backend.encode(text)
        except Exception:  # the library's own class: a vocabulary of words without one for those it does not know
            return False
        # Where a model leaves characters out, those behind them move up: what is left over is at the end.
        written = np.array([character.isspace() for character in text])
        for token, (start, stop) in zip(encoding.ids, encoding.offsets, strict=True):
            written[start:stop] |= token not in self._unknown
        return bool(written.all())


def _unknown_ids(backend: Any) -> set[int | None]:
    """Ids of the token that stands for what a tokenizer does not know."""
    if hasattr(backend.model, "unk_token"):
        return {None if backend.model.unk_token is None else backend.token_to_id(backend.model.unk_token)}
    return {json.loads(backend.to_str())["model"].get("unk_id")}


def needle_tokenizer(config: EvalConfig, data: DataConfig) -> str | None:
    """The tokenizer that texts are made with, where there are any: the one that training takes."""
    from ..data.source import tokenizer_of

    return tokenizer_of(data) if config.needles.lengths else None


def make_needles(config: EvalConfig, tokenizer: str | None, vocab_size: int) -> NeedleSet | None:
    """The texts of eval.needles as tokens; None without any. ConfigError where the tokenizer cannot write them, or not in their lengths."""
    if not config.needles.lengths:
        return None
    writer = Writer(tokenizer)
    documents, cells, first = [], [], []
    for cell, seed in _texts(config.needles):
        ids, begin = _fitted(writer, cell.task, cell.length, cell.depth, seed)
        documents.append(ids)
        cells.append(cell)
        first.append(begin - 1)
    _check_ids(documents, writer.name, vocab_size)
    return NeedleSet(TextCorpus(NEEDLES, documents), tuple(cells), np.array(first, dtype=np.int64))


def check_needles(config: EvalConfig, tokenizer: str | None, vocab_size: int) -> None:
    """Raise what `make_needles` would, without making more than needles and questions, of the shortest lengths: longer ones have room."""
    own = config.needles
    if own.lengths:
        writer = Writer(tokenizer)
        near = [length for length in own.lengths if length <= 2 * min(own.lengths)]
        documents = [writer.least(cell.task, cell.length, cell.depth, seed)[0] for cell, seed in _texts(replace(own, lengths=near))]
        around = writer.tokens(NeedleText(" ".join(FILL), "."))[0]
        _check_ids([*documents, around], writer.name, vocab_size)


def _texts(config: NeedleConfig) -> Iterator[tuple[Cell, tuple[object, ...]]]:
    """What each text is of, and its seed."""
    for length in sorted(set(config.lengths)):
        for task in dict.fromkeys(config.tasks):
            for depth in sorted(set(config.depths)):
                for sample in range(config.samples):
                    yield Cell(task, length, depth), (config.seed, length, depth, sample)


def _fitted(writer: Writer, task: NeedleTask, length: int, depth: float, seed: tuple[object, ...]) -> tuple[np.ndarray, int]:
    """A text of at most `length` tokens, and nearly so many, as ids, and where its answer begins."""
    ids, begin = writer.least(task, length, depth, seed)
    more, _ = writer.tokens(needle_text(task, _MEASURED, depth, *seed))
    each = (len(more) - len(ids)) / _MEASURED
    count = int(_NEARLY * (length - len(ids)) / each)
    while count > 0:
        longer, later = writer.tokens(needle_text(task, count, depth, *seed))
        if len(longer) <= length:
            return longer, later
        count -= max(1, round((len(longer) - length) / each))
    return ids, begin


def _check_ids(documents: list[np.ndarray], tokenizer: str, vocab_size: int) -> None:
    largest = max(int(document.max()) for document in documents)
    if largest >= vocab_size:
        raise DataError(
            f"tokenizer {tokenizer}",
            found=f"token id {largest}",
            expected=f"0 to {vocab_size - 1}, the model's vocabulary",
            hint="data.tokenizer=DIRECTORY of the model's own tokenizer",
        )


class NeedleTally:
    """Sums of each text: -log p of its answer's tokens, their number, and how many were the likeliest of all."""

    def __init__(self, num_texts: int) -> None:
        self._sums = np.zeros((num_texts, 3))

    def add(self, texts: np.ndarray, log_probs: np.ndarray, hits: np.ndarray) -> None:
        """Add targets: the text (T,) each is of, its log-probability (T,) float64, and whether it is the likeliest token (T,)."""
        np.add.at(self._sums, texts, np.stack([-log_probs, np.ones(len(texts)), hits.astype(np.float64)], axis=1))

    def vector(self) -> np.ndarray:
        """All sums, float64."""
        return self._sums.reshape(-1)

    def load(self, vector: np.ndarray) -> NeedleTally:
        """Take over the sums of a vector; returns itself."""
        self._sums = vector.reshape(self._sums.shape).copy()
        return self

    @property
    def losses(self) -> np.ndarray:
        """Sum of -log p of each answer (N,): its teacher-forced log-probability, negated."""
        return self._sums[:, 0]

    @property
    def targets(self) -> np.ndarray:
        """Tokens of each answer (N,)."""
        return self._sums[:, 1]

    @property
    def exact(self) -> np.ndarray:
        """Whether every token of an answer is the likeliest one after the text and the tokens before it (N,), bool."""
        return np.asarray((self._sums[:, 2] == self._sums[:, 1]) & (self._sums[:, 1] > 0))


@dataclass(frozen=True, slots=True)
class NeedleResult:
    """What an evaluation on needles came to; the tally is that of all ranks."""

    cells: tuple[Cell, ...]
    tally: NeedleTally
    tokens: int

    def fields(self) -> dict[str, Any]:
        """Fields of the `eval` event, under the name of a corpus: needles."""
        every = np.ones(len(self.cells), dtype=bool)
        return {
            "corpus": NEEDLES,
            **self._means(every),
            "tokens": self.tokens,
            "lengths": [{"length": length, **self._means(self._of(length))} for length in self._lengths],
            "positions": [],
            "context": None,
            "needles": self._cells(),
            "metrics": self.metrics(),
        }

    def metrics(self) -> dict[str, float | None]:
        """Numbers by the names that sinks and train.keep_best know them by."""
        every = self._means(np.ones(len(self.cells), dtype=bool))
        numbers = {f"eval/{NEEDLES}/loss": every["loss"], f"eval/{NEEDLES}/exact": every["exact"]}
        for name in ("loss", "exact"):
            numbers |= {f"eval/{NEEDLES}/{name}_{length_name(length)}": self._means(self._of(length))[name] for length in self._lengths}
        return numbers

    @property
    def _lengths(self) -> list[int]:
        return sorted({cell.length for cell in self.cells})

    def _of(self, length: int) -> np.ndarray:
        return np.array([cell.length == length for cell in self.cells])

    def _cells(self) -> list[dict[str, Any]]:
        """A row for each task, length and depth."""
        rows = []
        for cell in dict.fromkeys(self.cells):
            mine = np.array([other == cell for other in self.cells])
            log_prob = -float(self.tally.losses[mine].mean())
            row = {"task": cell.task.value, "length": cell.length, "depth": cell.depth, "samples": int(mine.sum())}
            rows.append(row | {"exact": float(self.tally.exact[mine].mean()), "log_prob": log_prob})
        return rows

    def _means(self, rows: np.ndarray) -> dict[str, Any]:
        """Loss per token, share of exact answers and number of tokens, over some texts."""
        targets = int(self.tally.targets[rows].sum())
        return {"loss": float(self.tally.losses[rows].sum()) / targets, "exact": float(self.tally.exact[rows].mean()), "targets": targets}
