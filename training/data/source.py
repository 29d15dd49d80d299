"""The training data of a run: lengths of a step first, tokens only where a rank asks for them."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from typing import Any

import numpy as np

from ...errors import ConfigError, DataError
from ..config import Learn, Objective
from .config import DataConfig, LongDocuments, check_sources, corpus_prefixes
from .indexed import IndexedCorpus, Kind
from .mix import MixedSampler, SourceUse, mix_streams
from .sampler import InOrder, Sampler, Sequence, SequenceTable
from .staged import StagedSampler, StageMix, in_one_table
from .tokenizer import read_vocabulary
from .train_stages import Stage

IGNORE = -100
"""Target of a position that has no loss."""


KINDS = {Objective.LANGUAGE_MODELLING: Kind.DOCUMENTS, Objective.DPO: Kind.PAIRS, Objective.GRPO: Kind.COMPLETIONS}
"""What each objective is about."""


class DataSource:
    """Sequences of every step, from one or more indexed corpora. Steps count from 0."""

    def __init__(
        self,
        corpora: list[IndexedCorpus],
        table: SequenceTable,
        sampler: Sampler | InOrder | MixedSampler | StagedSampler,
        vocab_size: int,
        tokenizer: str | None = None,
        owners: tuple[str, ...] = (),
    ) -> None:
        """`owners`: the source of data.sources that each corpus belongs to; none without sources."""
        self.corpora, self.table, self.sampler, self.vocab_size, self.tokenizer = corpora, table, sampler, vocab_size, tokenizer
        self._owners, self.source_names = owners, tuple(sorted(set(owners)))
        self._steps: dict[int, np.ndarray] = {}

    def in_order(self, rows: np.ndarray) -> DataSource:
        """The given rows of the table once, in order, as steps of about the same size."""
        sampler = InOrder(self.table, rows, self.sampler.batch_tokens)
        return DataSource(self.corpora, self.table, sampler, self.vocab_size, self.tokenizer)

    def source_of(self, step: int, index: int) -> int:
        """Number in `source_names` of the source that the step's sequence `index` is of."""
        return self.source_names.index(self._owners[self.sequence(step, index).corpus])

    def usage(self, step: int) -> list[SourceUse]:
        """What was given out of each source before step `step`; nothing without sources."""
        return self.sampler.usage(step) if isinstance(self.sampler, (MixedSampler, StagedSampler)) else []

    def stage(self, step: int) -> int | None:
        """The number, from 1, of the stage of train.stages that a step is in; None without stages."""
        return self.sampler.stage(step).number if isinstance(self.sampler, StagedSampler) else None

    def mix_state(self) -> list[dict[str, Any]] | None:
        """What a checkpoint keeps of the mix; None without sources."""
        return self.sampler.course.dump() if isinstance(self.sampler, (MixedSampler, StagedSampler)) else None

    def resume_mix(self, saved: list[dict[str, Any]] | None, done: int, steps: int) -> str | None:
        """Go on after `done` steps from what a checkpoint's `mix_state` was; one line where the mix is another from here on.

        DataError for a source that is seen too often in `steps` steps.
        """
        if not isinstance(self.sampler, (MixedSampler, StagedSampler)):
            return None
        is_new = self.sampler.resume(saved, done)
        self._steps.clear()
        self.sampler.check_epochs(steps)
        return f"data.sources from step {done + 1} on: {self.sampler.describe()}" if is_new else None

    def sequence(self, step: int, index: int) -> Sequence:
        """What the step's sequence `index` is."""
        return self.table[int(self._rows(step)[index])]

    def lengths(self, step: int) -> tuple[int, ...]:
        """Tokens of each sequence of the step; nothing is read."""
        return tuple(self.table.lengths_of(self._rows(step)).tolist())

    def parts(self, step: int, index: int) -> tuple[int, ...]:
        """Tokens of each document inside the step's sequence `index`: one, or two where it is a pair of answers."""
        sequence = self.sequence(step, index)
        return self.corpora[sequence.corpus].parts(sequence.document) or (len(sequence),)

    def documents(self, step: int) -> list[int]:
        """Tokens of each document of the step, those inside sequences one by one; nothing is read."""
        return [length for index in range(len(self._rows(step))) for length in self.parts(step, index)]

    def tokens(self, step: int, index: int, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """Token ids and target ids (both int64, (stop - start,)) of positions of the step's sequence `index`.

        target[t] is token t + 1 of the document, -100 at its end and where the loss mask says so.
        DataError for an id outside the model's vocabulary.
        """
        sequence = self.sequence(step, index)
        assert 0 <= start <= stop <= len(sequence), (step, index, start, stop)
        corpus = self.corpora[sequence.corpus]
        begin, end = sequence.start + start, sequence.start + stop
        last = min(end + 1, int(corpus.lengths[sequence.document]))
        read = corpus.tokens(sequence.document, begin, last)
        self._check_ids(sequence, begin, read)
        targets = np.full(stop - start, IGNORE, dtype=np.int64)
        targets[: max(last - begin - 1, 0)] = read[1:]
        mask = corpus.mask(sequence.document, begin, last)
        if mask is not None:
            targets[: max(last - begin - 1, 0)][~mask[1:]] = IGNORE
        return read[: stop - start], targets

    def num_target_tokens(self, step: int) -> int:
        """Targets of the whole step. Arithmetic on lengths, except that loss masks are read where there are any.

        DataError for a document whose mask leaves nothing to learn.
        """
        return sum(self._num_targets(self.table[row]) for row in self._rows(step).tolist())

    def describe(self, step: int, index: int, start: int = 0, stop: int | None = None) -> str:
        """`corpus PREFIX document 17 tokens 0-8192`, for messages: positions `start ... stop - 1` of the sequence (None: all)."""
        sequence = self.sequence(step, index)
        stop = len(sequence) if stop is None else stop
        return self._describe(replace(sequence, start=sequence.start + start, stop=sequence.start + stop))

    def fingerprint(self) -> str:
        """Identity of the stream of sequences: equal where (seed, step) means the same documents."""
        digest = hashlib.sha256(f"{self.sampler.seed} {self.sampler.batch_tokens}".encode())
        for column in (self.table.corpus, self.table.document, self.table.start, self.table.stop):
            digest.update(np.ascontiguousarray(column).data)
        return digest.hexdigest()

    def summary(self) -> str:
        """One line for logs: how much there is, and what was left out."""
        parts = [f"{len(self.table):,} sequences", f"{self.sampler.epoch_tokens:,} tokens per epoch"]
        if isinstance(self.sampler, (MixedSampler, StagedSampler)):
            parts.append(self.sampler.describe())
        if any(len(corpus.lengths) != len(corpus.stored_lengths) for corpus in self.corpora):
            parts.append("attention over the borders of documents")
        if self.table.num_too_short:
            parts.append(f"{self.table.num_too_short:,} documents under 2 tokens skipped")
        if self.table.num_dropped:
            parts.append(f"{self.table.num_dropped:,} documents over max_seq_len dropped")
        if self.table.num_truncated:
            parts.append(f"{self.table.num_truncated:,} documents over max_seq_len truncated")
        return ", ".join(parts)

    def _rows(self, step: int) -> np.ndarray:
        if step not in self._steps:
            # Plans are made a few steps ahead of the step that runs.
            self._steps = {key: rows for key, rows in self._steps.items() if abs(key - step) < 8}
            self._steps[step] = self.sampler.step(step)
        return self._steps[step]

    def _describe(self, sequence: Sequence) -> str:
        corpus = self.corpora[sequence.corpus].prefix
        return f"corpus {corpus} document {sequence.document} tokens {sequence.start}-{sequence.stop}"

    def _check_ids(self, sequence: Sequence, begin: int, read: np.ndarray) -> None:
        if len(read) == 0 or (int(read.min()) >= 0 and int(read.max()) < self.vocab_size):
            return
        at = int(np.flatnonzero((read < 0) | (read >= self.vocab_size))[0])
        raise DataError(
            f"corpus {self.corpora[sequence.corpus].prefix} document {sequence.document} position {begin + at}",
            found=f"token id {int(read[at])}",
            expected=f"0 to {self.vocab_size - 1}, the model's vocabulary",
            hint="prepare the corpus with this model's tokenizer, or set model.vocab_size to the tokenizer's",
        )

    def _num_targets(self, sequence: Sequence) -> int:
        corpus = self.corpora[sequence.corpus]
        length = int(corpus.lengths[sequence.document])
        last = min(sequence.stop + 1, length)
        mask = corpus.mask(sequence.document, sequence.start + 1, last)
        if mask is None:
            return last - sequence.start - 1
        count = int(np.count_nonzero(mask))
        if count == 0 and sequence.start == 0 and sequence.stop == length:
            raise no_loss_token(corpus, sequence.document)
        return count


def no_loss_token(corpus: IndexedCorpus, document: int) -> DataError:
    """The error for a document that only has tokens the mask leaves out."""
    return DataError(
        f"corpus {corpus.prefix} document {document}",
        found=f"a loss mask that leaves out all {int(corpus.lengths[document])} tokens",
        expected="at least one token to learn",
        hint="prepare the corpus again: efflaunch data prepare INPUT ... --skip-bad leaves such documents out",
    )


def open_data(
    config: DataConfig,
    seed: int,
    model_vocab_size: int,
    objective: Objective = Objective.LANGUAGE_MODELLING,
    stages: tuple[Stage, ...] = (),
    learn: Learn = Learn.ASSISTANT,
) -> DataSource:
    """The data of a run, checked: corpora whole and of the objective's kind, tokenizer inside the model's vocabulary,
    something to train on. `stages`: those of train.stages."""
    corpora, tokenizer = _opened(config, model_vocab_size, objective, learns_all=learn is Learn.ALL)
    if config.long_documents is not LongDocuments.DROP and objective is not Objective.LANGUAGE_MODELLING:
        _check_lengths(corpora, config.max_seq_len)
    owners = tuple(name for name in sorted(config.sources) for _ in config.sources[name].prefixes)
    if stages:
        tables = {length: _table(corpora, config, length) for length in {stage.data.max_seq_len for stage in stages}}
        mixes = [StageMix(stage, _mixed(stage.data, corpora, tables[stage.data.max_seq_len], seed, stage.key)) for stage in stages]
        table, mixes = in_one_table(tables, mixes)
        return DataSource(corpora, table, StagedSampler(mixes, seed), model_vocab_size, tokenizer, owners)
    table = _table(corpora, config, config.max_seq_len)
    if not config.sources:
        return DataSource(corpora, table, Sampler(table, seed, config.global_batch_tokens), model_vocab_size, tokenizer)
    return DataSource(corpora, table, _mixed(config, corpora, table, seed), model_vocab_size, tokenizer, owners)


def _table(corpora: list[IndexedCorpus], config: DataConfig, max_seq_len: int) -> SequenceTable:
    split, truncate = config.long_documents is LongDocuments.SPLIT, config.long_documents is LongDocuments.TRUNCATE
    lengths = [corpus.lengths for corpus in corpora]
    table = SequenceTable.from_lengths(lengths, max_seq_len=max_seq_len, split=split, truncate=truncate)
    return _without_untaught_pieces(corpora, table)


def _mixed(config: DataConfig, corpora: list[IndexedCorpus], table: SequenceTable, seed: int, key: str = "data") -> MixedSampler:
    return MixedSampler(table, mix_streams(config, corpora, table, seed), seed, config.global_batch_tokens, key)


def check_corpora(config: DataConfig, model_vocab_size: int, objective: Objective = Objective.LANGUAGE_MODELLING) -> list[IndexedCorpus]:
    """The corpora of the prefixes, opened; DataError where they or the tokenizer cannot be used, or are not for the objective."""
    return _opened(config, model_vocab_size, objective)[0]


def _opened(
    config: DataConfig, model_vocab_size: int, objective: Objective, *, learns_all: bool = False
) -> tuple[list[IndexedCorpus], str | None]:
    """The corpora, and the tokenizer."""
    prefixes, tokenizer = _located(config)
    corpora = [IndexedCorpus(prefix, learns_all=learns_all, joined=config.cross_document) for prefix in prefixes]
    check_vocabularies(corpora, tokenizer, model_vocab_size)
    check_kinds(corpora, objective)
    return corpora, tokenizer


def _located(config: DataConfig) -> tuple[list[str], str | None]:
    given = [name for name in ("prefixes", "sources", "builtin") if getattr(config, name)]
    if len(given) != 1:
        raise ConfigError(
            "data",
            found=" and ".join(given) if given else "none of prefixes, sources and builtin",
            expected="one of prefixes, sources and builtin",
            hint="data.prefixes=[PREFIX] data.builtin=null, or data.builtin=python_stdlib data.prefixes=[]",
        )
    check_sources(config)
    if config.builtin is None:
        return corpus_prefixes(config), config.tokenizer
    from .builtin import builtin_corpus

    made = builtin_corpus(config.builtin, vocab_size=config.vocab_size, cache_dir=config.cache_dir)
    return [made.prefix], config.tokenizer or made.tokenizer


def tokenizer_of(config: DataConfig) -> str | None:
    """The tokenizer that training takes: data.tokenizer, or a built-in corpus's own, which is made where need be."""
    return config.tokenizer if config.tokenizer is not None or config.builtin is None else _located(config)[1]


def check_kinds(corpora: list[IndexedCorpus], objective: Objective) -> None:
    """Raise DataError for a corpus whose documents are not what the objective is about."""
    for corpus in corpora:
        if corpus.kind is not KINDS[objective]:
            fitting = next(name for name, kind in KINDS.items() if kind is corpus.kind)
            raise DataError(
                f"corpus {corpus.prefix}",
                found=f"{corpus.kind.value}",
                expected=f"{KINDS[objective].value}, for train.objective={objective.value}",
                hint=f"train.objective={fitting.value}, or other data.prefixes",
            )


def _check_lengths(corpora: list[IndexedCorpus], max_seq_len: int) -> None:
    # Half of a pair, or a completion without its prompt, would be another thing to learn.
    for corpus in corpora:
        longest = int(corpus.lengths.argmax())
        if corpus.lengths[longest] > max_seq_len:
            raise DataError(
                f"corpus {corpus.prefix} document {longest}",
                found=f"{corpus.lengths[longest]:,} tokens",
                expected=f"at most data.max_seq_len={max_seq_len}: {corpus.kind.value} are not cut (a pair counts both its halves)",
                hint=f"data.max_seq_len={corpus.lengths[longest]}, or data.long_documents=drop",
            )


def check_vocabularies(corpora: list[IndexedCorpus], tokenizer: str | None, model_vocab_size: int) -> None:
    """Raise DataError unless the tokenizer fits the model and is the one the corpora were prepared with (where they say)."""
    vocabulary = None if tokenizer is None else read_vocabulary(tokenizer)
    if vocabulary is not None and vocabulary.size > model_vocab_size:
        raise _vocab_mismatch(f"tokenizer {tokenizer}", vocabulary.size, model_vocab_size)
    for corpus in corpora:
        origin = (corpus.metadata or {}).get("tokenizer") or {}
        if int(origin.get("vocab_size", 0)) > model_vocab_size:
            raise _vocab_mismatch(f"corpus {corpus.prefix}, tokenizer {origin.get('path')}", int(origin["vocab_size"]), model_vocab_size)
        if vocabulary is not None and origin.get("vocab_sha256") not in (None, vocabulary.sha256):
            raise DataError(
                f"corpus {corpus.prefix}",
                found=f"tokens of another tokenizer ({origin.get('path')})",
                expected=f"tokens of data.tokenizer ({tokenizer})",
                hint=f"data.tokenizer={origin.get('path')}, or prepare the corpus again with --tokenizer {tokenizer}",
            )


def _vocab_mismatch(where: str, vocab_size: int, model_vocab_size: int) -> DataError:
    return DataError(
        where,
        found=f"a vocabulary of {vocab_size:,} tokens",
        expected=f"at most the model's {model_vocab_size:,}",
        hint=f"model.vocab_size={vocab_size}, or another tokenizer",
    )


def _without_untaught_pieces(corpora: list[IndexedCorpus], table: SequenceTable) -> SequenceTable:
    # Only cut documents are looked at: a piece that is all prompt would cost compute and teach nothing.
    masked = np.array([corpus.has_mask for corpus in corpora], dtype=bool)
    if not masked.any():
        return table
    untaught = []
    ends = np.empty(len(table), dtype=np.int64)
    for number, corpus in enumerate(corpora):
        mine = table.corpus == number
        ends[mine] = corpus.lengths[table.document[mine]]
    cut = (table.start > 0) | (table.stop < ends)
    for row in np.flatnonzero(cut & masked[table.corpus]).tolist():
        sequence = table[row]
        corpus = corpora[sequence.corpus]
        last = min(sequence.stop + 1, int(corpus.lengths[sequence.document]))
        mask = corpus.mask(sequence.document, sequence.start + 1, last)
        if mask is not None and not mask.any():
            whole = corpus.mask(sequence.document, 1, int(corpus.lengths[sequence.document]))
            if whole is not None and not whole.any():
                raise no_loss_token(corpus, sequence.document)
            untaught.append(row)
    return table.without(np.array(untaught, dtype=np.int64)) if untaught else table
