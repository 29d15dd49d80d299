"""Group-relative policy optimisation (2402.03300, eq. 3) on completions that were sampled and rewarded before. Pure.

Per token of a completion with advantage A: ratio = p / p_old, and
    term = -min(ratio x A, clip(ratio, 1 - low, 1 + high) x A) + kl_weight x k3,    k3 = p_ref / p - log(p_ref / p) - 1,
k3 being the unbiased, never negative estimator of KL(p || p_ref) (2402.03300, eq. 4). The loss is the mean over all tokens of the
step, not first over each completion (2503.14476, sec. 3.3: long completions are not weighted down), so it separates by position.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

STATS = ("grpo_ratio", "grpo_clip_fraction", "grpo_kl")
"""Means over completion tokens: of the ratio, of whether the clip took the gradient away, and of k3 (0 without a reference)."""


@dataclass(frozen=True, slots=True)
class RolloutOptions:
    """Settings of the policy loss; `clip_low`, `clip_high`: how far the ratio may leave one; `kl_weight`: weight of k3."""

    clip_low: float
    clip_high: float
    kl_weight: float


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


def rollout_terms(log_probs: Tensor, rows: RolloutRows, options: RolloutOptions) -> TokenTerms:
    """GRPO terms of C completion tokens; log_probs (C,) float64 is under the weights in training."""
    ratio = (log_probs - rows.old).exp()
    gain = ratio * rows.advantage
    clipped_gain = ratio.clamp(1 - options.clip_low, 1 + options.clip_high) * rows.advantage
    clipped = clipped_gain < gain
    terms = -torch.minimum(gain, clipped_gain)
    slopes = torch.where(clipped, 0.0, -gain)
    kl = torch.zeros_like(terms)
    if rows.reference is not None:
        shift = rows.reference - log_probs
        kl = shift.exp() - shift - 1
        terms = terms + options.kl_weight * kl
        slopes = slopes + options.kl_weight * (1 - shift.exp())
    return TokenTerms(terms, slopes, torch.stack((ratio, clipped.to(ratio.dtype), kl), 1))
