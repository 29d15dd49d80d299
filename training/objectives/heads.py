"""Applies an objective to a micro-batch's last layer output. One object per step; ranks meet in `group_sum` alone.

Note: pairs. The two answers of a pair lie in one group of one micro-batch (their unit of planning), as two documents, so a sum
over the group's ranks completes the margin of each. With one pair in the group, and a loss that is a function of its margin, its rows
are gone through once: gradients are made with slopes of +1 and -1 (over each answer's tokens, where the loss averages: those are counted
before) and multiplied with the one number at the end (StreamBP, 2506.03077, sec. 3.3). With several pairs, or two numbers of one, the
head's gradient would need an accumulator of V x M for each number: instead the head runs once more, without gradients, for the
log-probabilities first (2 x V x M operations per answer token, of about 8 x V x M the head takes anyway).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from ...model.chunked_loss import IGNORE, Head, Seen, Terms, chunked_log_probs, chunked_loss, cross_entropy
from ..config import GrpoRatio
from ..data.shard import PackedShard
from .preference import CHOSEN, PairOptions, preference_losses, sum_by
from .preference import STATS as PAIR_STATS
from .rollout import STATS as TOKEN_STATS
from .rollout import RolloutOptions, RolloutRows, rollout_terms, token_divisor

HeadLoss = Callable[[Head], Tensor]
GroupSum = Callable[[Tensor], Tensor]
"""The sum of a small tensor over the ranks of the group, on each of them. Collective inside the group."""


class StepObjective(Protocol):
    """The objective of one step."""

    names: tuple[str, ...]
    stats: Tensor
    """Sums (len(names),) float64 of this rank over the step so far; divided by `count` over all ranks they are means.

    Of language modelling with data.sources there follow, for each source, -log p over its targets, and how many those are.
    """
    count: int

    def head_loss(self, shard: PackedShard, *, leads: bool, group_sum: GroupSum) -> HeadLoss:
        """The loss of one micro-batch's shard; over its ranks, micro-batches and groups it adds up to the mean over the step.

        `leads`: this rank speaks for its group, where a loss belongs to all its ranks together.
        """


@dataclass(frozen=True, slots=True)
class SourceLosses:
    """What the losses of each source are summed by."""

    num_sources: int
    source_of: Callable[[int], int]
    """The number of the source that a sequence of the step is of."""


class LanguageModelling:
    """Cross-entropy of the next token, the mean over all target tokens of the step; `smoothing`: of labels, as `cross_entropy` takes it.

    `by_source`: also sum -log p of the targets of each source, which adds nothing to the gradient.
    """

    names: tuple[str, ...] = ()

    def __init__(
        self, num_targets: int, device: torch.device, *, smoothing: float = 0.0, by_source: SourceLosses | None = None
    ) -> None:
        size = 0 if by_source is None else 2 * by_source.num_sources
        self.count, self.stats = num_targets, torch.zeros(size, dtype=torch.float64, device=device)
        self._smoothing, self._by_source = smoothing, by_source

    def head_loss(self, shard: PackedShard, *, leads: bool, group_sum: GroupSum) -> HeadLoss:
        seen = None if self._by_source is None else self._summed(shard, self._by_source)
        return lambda head: cross_entropy(head, 1.0 / self.count, self._smoothing, seen)

    def _summed(self, shard: PackedShard, by_source: SourceLosses) -> Seen:
        """Adds what rows come to to their sources: by where the pieces end, for a number per token would be memory of its own."""
        size, device = by_source.num_sources, self.stats.device
        numbers = [by_source.source_of(shard.parts[piece.sequence].sequence) for piece in shard.slices]
        owners = torch.tensor(numbers, dtype=torch.int64, device=device)
        ends = torch.tensor([len(piece) for piece in shard.slices], dtype=torch.int64, device=device).cumsum(0)

        def seen(rows: Tensor, log_probs: Tensor) -> None:
            mine = owners[torch.bucketize(rows, ends, right=True)]
            self.stats[:size] -= sum_by(mine, log_probs, size)
            self.stats[size:] += sum_by(mine, torch.ones_like(log_probs), size)

        return seen


class PairReference(Protocol):
    def __call__(self, sequence: int) -> np.ndarray:
        """Log-probabilities (2,) float64 of the chosen and the rejected answer of a sequence of the step, under the reference."""


class Preference:
    """DPO: the mean over the pairs of the step (Note: pairs)."""

    names: tuple[str, ...] = PAIR_STATS

    def __init__(
        self, num_pairs: int, device: torch.device, *, options: PairOptions, reference: PairReference, chosen_tokens: int = 0
    ) -> None:
        """Prepare the step; `chosen_tokens`: targets of all its chosen answers, where their cross-entropy is added."""
        self.count, self.stats = num_pairs, torch.zeros(len(PAIR_STATS), dtype=torch.float64, device=device)
        self.options, self._reference, self._chosen_tokens = options, reference, chosen_tokens

    def head_loss(self, shard: PackedShard, *, leads: bool, group_sum: GroupSum) -> HeadLoss:
        units = dict.fromkeys(part.sequence for part in shard.parts)
        if not units:
            return lambda head: cross_entropy(head, 0.0)
        order = {sequence: index for index, sequence in enumerate(units)}
        sides = shard.by_row(lambda part: 2 * order[part.sequence] + part.number)
        tokens = np.bincount(sides[shard.target_ids != IGNORE], minlength=2 * len(units)).astype(np.float64)
        reference = np.stack([self._reference(sequence) for sequence in units])
        pairs = _Pairs(self, sides, reference, tokens, leads, group_sum)
        return pairs.once if len(units) == 1 and self.options.of_margin else pairs.twice

    def judge(self, sums: Tensor, reference: Tensor, tokens: Tensor | None, *, leads: bool) -> tuple[Tensor, Tensor]:
        """Loss and slopes (P, 2) from the pairs' complete sums (P, 2), divided by the step's pairs; counted where it leads."""
        pairs = preference_losses(sums, reference, self.options, tokens)
        if leads:
            self.stats += pairs.stats.sum(0)
        loss, slopes = pairs.losses.sum() * (leads / self.count), pairs.slopes / self.count
        if self.options.sft_weight:
            share = self.options.sft_weight / self._chosen_tokens
            loss = loss - leads * share * sums[:, CHOSEN].sum()
            slopes[:, CHOSEN] -= share
        return loss, slopes


class _Pairs:
    """The pairs of one micro-batch on one rank; `sides` (T,): 2 x pair + (0 chosen, 1 rejected), `reference` (P, 2), `tokens` (2P,): this
    rank's targets of each side."""

    def __init__(
        self, objective: Preference, sides: np.ndarray, reference: np.ndarray, tokens: np.ndarray, leads: bool, group_sum: GroupSum
    ) -> None:
        self._objective, self._leads, self._group_sum = objective, leads, group_sum
        self._sides, self._reference, self._own_tokens = (
            torch.from_numpy(column).to(objective.stats.device) for column in (sides, reference, tokens)
        )

    def once(self, head: Head) -> Tensor:
        """One pair: slopes +1 and -1, or those over each answer's tokens, in one pass; then the number all gradients have in common."""
        sums, tokens = torch.zeros(2, dtype=torch.float64, device=head.x.device), self._tokens()
        signs = torch.tensor((1, -1), dtype=torch.float64, device=head.x.device)
        shares = (signs if tokens is None else signs / tokens[0]).to(head.wide)

        def terms(rows: Tensor, log_probs: Tensor) -> tuple[Tensor, Tensor]:
            sides = self._sides[rows]
            sums.add_(sum_by(sides, log_probs, 2))
            return log_probs, shares[sides]

        def finish() -> tuple[Tensor, Tensor]:
            loss, slopes = self._judge(self._group_sum(sums), tokens)
            return loss, (slopes[0, 0] if tokens is None else slopes[0, 0] * tokens[0, 0]).to(head.wide)

        return chunked_loss(head, terms, finish=finish)

    def twice(self, head: Head) -> Tensor:
        """Several numbers: log-probabilities first, then each row with that of its pair or answer."""
        log_probs, size, tokens = chunked_log_probs(head), self._reference.numel(), self._tokens()
        sums = torch.zeros(size, dtype=torch.float64, device=head.x.device)
        for rows in head.chunks():
            sums += sum_by(self._sides[rows], log_probs[rows], size)
        loss, slopes = self._judge(self._group_sum(sums), tokens)
        by_side = slopes.flatten().to(head.wide)
        return chunked_loss(
            head, lambda rows, log_probs: (log_probs, by_side[self._sides[rows]]), finish=lambda: (loss, torch.ones_like(loss))
        )

    def _tokens(self) -> Tensor | None:
        """Target tokens (P, 2) of each answer over the group's ranks, where the loss divides by them."""
        return self._group_sum(self._own_tokens.clone()).view(-1, 2) if self._objective.options.averages else None

    def _judge(self, sums: Tensor, tokens: Tensor | None) -> tuple[Tensor, Tensor]:
        return self._objective.judge(sums.view(-1, 2), self._reference, tokens, leads=self._leads)


class RolloutData(Protocol):
    def __call__(self, sequence: int, start: int, stop: int) -> tuple[float, np.ndarray, np.ndarray | None]:
        """The advantage of a sequence of the step, and log p_old and log p_ref for the targets of positions `start ... stop - 1`
        (None: no reference), float64."""


class Rollout:
    """GRPO: the sum over the completion tokens of the step, over what `options.normalize` says."""

    def __init__(
        self, num_targets: int, num_completions: int, device: torch.device, *, options: RolloutOptions, data: RolloutData, kl: bool
    ) -> None:
        """Prepare the step; `kl`: the data has a reference."""
        self.names: tuple[str, ...] = TOKEN_STATS if kl else TOKEN_STATS[:-1]
        self.count, self.stats = num_targets, torch.zeros(len(self.names), dtype=torch.float64, device=device)
        self.options, self._num_completions, self._data = options, num_completions, data

    def head_loss(self, shard: PackedShard, *, leads: bool, group_sum: GroupSum) -> HeadLoss:
        rows = self._rows(shard)
        if not self.options.needs_lengths:
            return lambda head: chunked_loss(head, self.terms(rows))
        return _Completions(self, rows, shard, group_sum)

    def terms(self, rollout: RolloutRows, lengths: Tensor | None = None, log_ratios: Tensor | None = None) -> Terms:
        """The terms of rows; `lengths` (T,): tokens of each row's completion, `log_ratios` (T,): its log-ratio, where they are its."""

        def terms(rows: Tensor, log_probs: Tensor) -> tuple[Tensor, Tensor]:
            log_ratio = None if log_ratios is None else log_ratios[rows]
            made = rollout_terms(log_probs.double(), rollout.pick(rows), self.options, log_ratio)
            self.stats += made.stats.sum(0)[: len(self.stats)]
            divisor = token_divisor(self.options, self.count, self._num_completions, None if lengths is None else lengths[rows])
            return (made.terms / divisor).to(log_probs.dtype), (made.slopes / divisor).to(log_probs.dtype)

        return terms

    def _rows(self, shard: PackedShard) -> RolloutRows:
        pieces = [(len(piece), *self._data(shard.parts[piece.sequence].sequence, piece.start, piece.stop)) for piece in shard.slices]
        empty, device = np.zeros(0), self.stats.device
        advantage = np.concatenate([empty, *(np.full(length, value) for length, value, _, _ in pieces)])
        old = np.concatenate([empty, *(values for _, _, values, _ in pieces)])
        reference = [values for _, _, _, values in pieces if values is not None]
        assert not reference or len(reference) == len(pieces), "a reference for some sequences only"
        columns = (torch.from_numpy(advantage).to(device), torch.from_numpy(old).to(device))
        return RolloutRows(*columns, torch.from_numpy(np.concatenate(reference)).to(device) if reference else None)


class _Completions:
    """The completions of one micro-batch on one rank, where a row's term depends on the whole of its own."""

    def __init__(self, objective: Rollout, rows: RolloutRows, shard: PackedShard, group_sum: GroupSum) -> None:
        self._objective, self._rows, self._group_sum, device = objective, rows, group_sum, objective.stats.device
        order = {part.sequence: index for index, part in enumerate(shard.parts)}
        owners = shard.by_row(lambda part: order[part.sequence])
        tokens = np.bincount(owners[shard.target_ids != IGNORE], minlength=len(order)).astype(np.float64)
        self._owners, self._own_tokens = torch.from_numpy(owners).to(device), torch.from_numpy(tokens).to(device)

    def __call__(self, head: Head) -> Tensor:
        """With ratios of sequences log-probabilities first, then each row with its completion's ratio."""
        lengths, log_ratios = self._group_sum(self._own_tokens.clone()), None
        if self._objective.options.level is GrpoRatio.SEQUENCE:
            log_ratios = (self._group_sum(self._sums(head)) / lengths)[self._owners]
        return chunked_loss(head, self._objective.terms(self._rows, lengths[self._owners], log_ratios))

    def _sums(self, head: Head) -> Tensor:
        """Sums of log p - log p_old over this rank's tokens of each completion."""
        log_probs, sums = chunked_log_probs(head), torch.zeros_like(self._own_tokens)
        for rows in head.chunks():
            sums += sum_by(self._owners[rows], log_probs[rows].double() - self._rows.old[rows], len(sums))
        return sums
