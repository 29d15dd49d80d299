"""Direct preference optimisation (2305.18290, eq. 7): of two answers to a prompt, make the chosen one likelier. Pure.

loss = -log sigmoid(beta x margin), margin = (log p(chosen) - log p_ref(chosen)) - (log p(rejected) - log p_ref(rejected)), where
log p of an answer is the sum over its tokens. Its derivative by every token's log-probability is one number per pair,
-+ beta x sigmoid(-beta x margin): known only once the whole pair was seen, a factor of everything before it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

CHOSEN, REJECTED = 0, 1
STATS = ("dpo_margin", "dpo_accuracy", "dpo_chosen_reward", "dpo_rejected_reward")
"""Means over pairs: of beta x margin, of whether it is positive, and of its two halves."""


@dataclass(frozen=True, slots=True)
class PairLosses:
    """The losses of P pairs: `losses` (P,), `slopes` (P, 2) = d loss / d log p of the two answers, `stats` (P, len(STATS))."""

    losses: Tensor
    slopes: Tensor
    stats: Tensor


def preference_losses(log_probs: Tensor, reference: Tensor, beta: float) -> PairLosses:
    """DPO losses of pairs; log_probs and reference (P, 2): sums over the tokens of chosen and rejected answer, float64."""
    rewards = beta * (log_probs - reference)
    margins = rewards[:, CHOSEN] - rewards[:, REJECTED]
    slopes = beta * torch.sigmoid(-margins)
    columns = (margins, (margins > 0).to(margins.dtype), rewards[:, CHOSEN], rewards[:, REJECTED])
    return PairLosses(-F.logsigmoid(margins), torch.stack((-slopes, slopes), 1), torch.stack(columns, 1))


def sum_by(index: Tensor, values: Tensor, size: int) -> Tensor:
    """Sums of `values` (C,) by `index` (C,), (size,) float64, in an order that never varies (scattered adds on GPUs do)."""
    mine = index.unsqueeze(0) == torch.arange(size, device=index.device).unsqueeze(1)
    return torch.where(mine, values.double(), 0.0).sum(1)
