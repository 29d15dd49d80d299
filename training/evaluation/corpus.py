"""Opens the corpora of an evaluation: each pass over one is a source of sequences like a run's, with targets only where they count."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ...errors import DataError
from ...units import format_tokens
from ..data.indexed import IndexedCorpus, Kind
from ..data.sampler import InOrder, SequenceTable
from ..data.source import IGNORE, DataSource, check_vocabularies
from .config import GAIN, EvalConfig
from .windows import SHORT, WHOLE, Windows, length_windows, short_windows, whole_windows


class WindowSource(DataSource):
    """The windows of one pass, in order, in steps of about `batch_tokens`."""

    def __init__(self, corpus: IndexedCorpus, windows: Windows, batch_tokens: int, vocab_size: int) -> None:
        place = np.zeros(len(windows), dtype=np.int16)
        table = SequenceTable(place, windows.document, windows.start, windows.stop, num_too_short=0, num_dropped=0)
        order = InOrder(table, np.arange(len(windows)), batch_tokens)
        super().__init__([corpus], table, order, vocab_size)
        self.windows, self.num_steps = windows, order.num_steps

    def tokens(self, step: int, index: int, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """As of every source, with no target before the window's first one that counts."""
        ids, targets = super().tokens(step, index, start, stop)
        row = int(self._rows(step)[index])
        before = int(self.windows.first[row] - self.windows.start[row]) - start
        targets[: max(before, 0)] = IGNORE
        return ids, targets


@dataclass(frozen=True, slots=True)
class EvalCorpus:
    """One corpus and its passes by name (windows.py); those of lengths by their number."""

    name: str
    corpus: IndexedCorpus
    passes: dict[str | int, Windows]

    def source(self, key: str | int, batch_tokens: int, vocab_size: int) -> WindowSource:
        """The windows of a pass as steps of about `batch_tokens`."""
        return WindowSource(self.corpus, self.passes[key], batch_tokens, vocab_size)


def open_corpora(config: EvalConfig, *, max_seq_len: int, vocab_size: int, tokenizer: str | None) -> list[EvalCorpus]:
    """The corpora with all their passes; DataError for one that is damaged, of another tokenizer or kind, or without targets."""
    opened = []
    for name, prefix in sorted(config.corpora.items()):
        corpus = IndexedCorpus(prefix)
        check_vocabularies([corpus], tokenizer, vocab_size)
        if corpus.kind is not Kind.DOCUMENTS:
            raise DataError(
                f"eval.corpora.{name}",
                found=f"{corpus.kind.value} in {prefix}",
                expected="documents: evaluation is of the loss of language modelling",
                hint="a corpus that efflaunch data prepare made of texts or chats",
            )
        opened.append(EvalCorpus(name, corpus, _passes(config, name, corpus, max_seq_len)))
    return opened


def _passes(config: EvalConfig, name: str, corpus: IndexedCorpus, max_seq_len: int) -> dict[str | int, Windows]:
    whole = whole_windows(corpus.lengths, max_seq_len, config.max_tokens)
    if not _has_targets(corpus, whole):
        raise DataError(
            f"eval.corpora.{name}",
            found=f"no target in {corpus.prefix}: {corpus.num_documents:,} documents of up to {int(corpus.lengths.max()):,} tokens"
            + (" and a loss mask" if corpus.has_mask else ""),
            expected="documents of two tokens or more, with something to predict",
            hint="eval.corpora={web: PREFIX} with another corpus",
        )
    passes: dict[str | int, Windows] = {WHOLE: whole}
    short = short_windows(whole, config.context_tokens)
    if _has_targets(corpus, short):
        passes[SHORT] = short
    by_length = length_windows(corpus.lengths, config.lengths, config.max_tokens)
    if by_length and not _has_targets(corpus, by_length[max(by_length)]):
        longest = int(corpus.lengths.max())
        raise DataError(
            f"eval.corpora.{name}",
            found=f"no target with {format_tokens(max(by_length))} tokens of context: documents of up to {longest:,} tokens",
            expected="a document as long as the longest of eval.lengths",
            hint=f"eval.lengths up to {longest}, or a corpus of longer documents",
        )
    return passes | dict(by_length)


def check_followed(metric: str | None, corpora: list[EvalCorpus]) -> None:
    """Raise DataError where train.keep_best follows what the rest of the context is worth, and no document is longer than that."""
    for corpus in corpora:
        if metric == f"eval/{corpus.name}/{GAIN}" and SHORT not in corpus.passes:
            longest = int(corpus.corpus.lengths.max())
            raise DataError(
                "train.keep_best",
                found=f"{metric}, and documents of up to {longest:,} tokens in {corpus.corpus.prefix}",
                expected="documents longer than eval.context_tokens, to compare a shorter context with",
                hint=f"eval.context_tokens={max(longest // 2, 2)}, or train.keep_best=eval/{corpus.name}/loss",
            )


def _has_targets(corpus: IndexedCorpus, windows: Windows) -> bool:
    """Whether anything counts; loss masks are read up to the first target."""
    if not corpus.has_mask:
        return windows.num_targets(corpus.lengths) > 0
    for row in range(len(windows)):
        document = int(windows.document[row])
        last = min(int(windows.stop[row]) + 1, int(corpus.lengths[document]))
        mask = corpus.mask(document, min(int(windows.first[row]) + 1, last), last)
        if mask is not None and mask.any():
            return True
    return False
