"""Group-relative policy optimisation (2402.03300, eq. 3) on completions that were sampled and rewarded before. Pure.

Per token of a completion with advantage A: ratio = p / p_old, and
    term = -min(ratio x A, clip(ratio, 1 - low, 1 + high) x A) + kl_weight x k3,    k3 = p_ref / p - log(p_ref / p) - 1,
k3 being the unbiased, never negative estimator of KL(p || p_ref) (2402.03300, eq. 4). With `delta` the first ratio is min(ratio, delta):
without it nothing holds a negative advantage's ratio from above (2505.07291). The sum over all tokens of the step is divided by their
number (dapo: 2503.14476, sec. 3.3: long completions are not weighted down), each completion's by its own and all by the number of
completions (grpo: 2402.03300, eq. 3), or by completions x a fixed length (dr_grpo: 2503.20783).

Note: ratios of sequences. With GSPO (2507.18071) every token of a completion of n tokens has the same ratio, exp(mean of log p - log
p_old). A completion's term -min(...) then counts n times, each time over the divisor of its tokens, and its derivative by one token's
log-probability is 1/n of that sum's: the same expression as with token's own ratio, so one function serves both.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..config import GrpoNormalize, GrpoRatio

STATS = ("grpo_ratio", "grpo_clip_fraction", "grpo_kl")
"""Means over completion tokens: of the ratio, of whether the clip took the gradient away, and of k3 (0 without a reference)."""


@dataclass(frozen=True, slots=True)
class RolloutOptions:
    """Settings of the policy loss; `clip_low`, `clip_high`: how far the ratio may leave one; `kl_weight`: weight of k3; `delta`: the
    largest ratio at all; `max_completion`: tokens that a completion counts as, with dr_grpo."""

    clip_low: float
    clip_high: float
    kl_weight: float
    delta: float | None = None
    normalize: GrpoNormalize = GrpoNormalize.DAPO
    max_completion: int | None = None
    level: GrpoRatio = GrpoRatio.TOKEN

    @property
    def needs_lengths(self) -> bool:
        """Whether a row's term depends on its completion's number of tokens."""
        return self.normalize is GrpoNormalize.GRPO or self.level is GrpoRatio.SEQUENCE


@dataclass(frozen=True, slots=True)
class RolloutRows:
    """Inputs per row, (T,) float64: the completion's advantage, log p_old and log p_ref of the target (None: no reference)."""

    advantage: Tensor
    old: Tensor
    reference: Tensor | None

    def pick(self, rows: Tensor) -> RolloutRows:
        """The same for the given rows only."""
        return RolloutRows(self.advantage[rows], self.old[rows], None if self.reference is None else self.reference[rows])


@dataclass(frozen=True, slots=True)
class TokenTerms:
    """Per-token results: `terms` (C,), `slopes` (C,) = d term / d log p, `stats` (C, len(STATS))."""

    terms: Tensor
    slopes: Tensor
    stats: Tensor


def token_divisor(options: RolloutOptions, num_tokens: int, num_completions: int, lengths: Tensor | None) -> float | Tensor:
    """What each row's term is divided by: one number, or (C,) from the tokens of each row's completion, `lengths` (C,).

    `num_tokens`, `num_completions`: of the whole step.
    """
    if options.normalize is GrpoNormalize.GRPO:
        assert lengths is not None
        return lengths * num_completions
    if options.normalize is GrpoNormalize.DR_GRPO:
        assert options.max_completion is not None
        return num_completions * options.max_completion
    return num_tokens


def rollout_terms(log_probs: Tensor, rows: RolloutRows, options: RolloutOptions, log_ratio: Tensor | None = None) -> TokenTerms:
    """GRPO terms of C completion tokens; log_probs (C,) float64 is under the weights in training.

    `log_ratio` (C,): the log-ratio of each token's completion, where ratios are of sequences (Note: ratios of sequences).
    """
    ratio = (log_probs - rows.old if log_ratio is None else log_ratio).exp()
    gain = (ratio if options.delta is None else ratio.clamp(max=options.delta)) * rows.advantage
    clipped_gain = ratio.clamp(1 - options.clip_low, 1 + options.clip_high) * rows.advantage
    clipped = clipped_gain < gain
    if options.delta is not None:
        clipped = clipped | (ratio > options.delta)
    terms = -torch.minimum(gain, clipped_gain)
    slopes = torch.where(clipped, 0.0, -gain)
    kl = torch.zeros_like(terms)
    if rows.reference is not None:
        shift = rows.reference - log_probs
        kl = shift.exp() - shift - 1
        terms = terms + options.kl_weight * kl
        slopes = slopes + options.kl_weight * (1 - shift.exp())
    return TokenTerms(terms, slopes, torch.stack((ratio, clipped.to(ratio.dtype), kl), 1))
