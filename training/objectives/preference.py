"""Direct preference optimisation (2305.18290, eq. 7) and its relatives: of two answers to a prompt, make the chosen one likelier. Pure.

The reward of an answer is beta x (log p - log p_ref), log p being the sum over its tokens, and the margin of a pair is the chosen
answer's reward less the rejected one's. Losses of a pair, s = sigmoid, e = the share of labels taken to be wrong:

    sigmoid       -(1 - e) log s(margin) - e log s(-margin)                   2305.18290, eq. 7; smoothed: cDPO
    robust        (-(1 - e) log s(margin) + e log s(-margin)) / (1 - 2e)      2403.00409: unbiased where e are wrong
    hinge         max(0, 1 - margin)                                          2309.06657
    ipo           ((margin - 1/2) / beta)^2, rewards divided by tokens        2310.12036, eq. 17
    sigmoid_norm  -log s(margin), rewards divided by tokens
    apo_zero      s(-reward of the chosen) + s(reward of the rejected)        2408.06266, eq. 7

Where an answer's reward is divided by its number of tokens, margins are of averages. All but apo_zero are functions of the margin
alone: their derivatives by the two rewards are one number and its negative, known only once the whole pair was seen, a factor of
everything before it. The chosen answers' cross-entropy may be added (2404.19733, which averages within each answer; here it
is the mean over all their tokens in the step, as fine-tuning on them would be).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from ..config import DpoLoss

CHOSEN, REJECTED = 0, 1
STATS = ("dpo_margin", "dpo_accuracy", "dpo_chosen_reward", "dpo_rejected_reward")
"""Means over pairs: of the margin of summed rewards, of whether it is positive, and of its two halves; the same for every loss."""


@dataclass(frozen=True, slots=True)
class PairOptions:
    """Settings of the pairs' loss; `smoothing`: share of labels taken to be wrong; `sft_weight`: of the chosen answers' cross-entropy."""

    beta: float
    loss: DpoLoss = DpoLoss.SIGMOID
    smoothing: float = 0.0
    sft_weight: float = 0.0

    @property
    def averages(self) -> bool:
        """Whether an answer's reward is divided by its number of tokens."""
        return self.loss in (DpoLoss.IPO, DpoLoss.SIGMOID_NORM)

    @property
    def of_margin(self) -> bool:
        """Whether the loss is a function of the margin alone: its derivatives by the two rewards add up to zero."""
        return self.loss is not DpoLoss.APO_ZERO and not self.sft_weight


@dataclass(frozen=True, slots=True)
class PairLosses:
    """The losses of P pairs: `losses` (P,), `slopes` (P, 2) = d loss / d log p of the two answers, `stats` (P, len(STATS))."""

    losses: Tensor
    slopes: Tensor
    stats: Tensor


def preference_losses(log_probs: Tensor, reference: Tensor, options: PairOptions, tokens: Tensor | None = None) -> PairLosses:
    """Losses of pairs; log_probs and reference (P, 2): sums over the tokens of chosen and rejected answer, float64.

    `tokens` (P, 2): how many those are, where the loss divides by them (`options.averages`).
    """
    assert (tokens is not None) == options.averages, "numbers of tokens where the loss divides by them, and only there"
    rewards = options.beta * (log_probs - reference)
    margins = rewards[:, CHOSEN] - rewards[:, REJECTED]
    losses, slopes = _judged(rewards if tokens is None else rewards / tokens, options)
    slopes = options.beta * slopes
    columns = (margins, (margins > 0).to(margins.dtype), rewards[:, CHOSEN], rewards[:, REJECTED])
    return PairLosses(losses, slopes if tokens is None else slopes / tokens, torch.stack(columns, 1))


def _judged(rewards: Tensor, options: PairOptions) -> tuple[Tensor, Tensor]:
    """Losses (P,), and their derivatives (P, 2) by the rewards."""
    if options.loss is DpoLoss.APO_ZERO:
        spread = torch.sigmoid(rewards) * torch.sigmoid(-rewards)
        losses = torch.sigmoid(-rewards[:, CHOSEN]) + torch.sigmoid(rewards[:, REJECTED])
        return losses, torch.stack((-spread[:, CHOSEN], spread[:, REJECTED]), 1)
    losses, slopes = _of_margin(rewards[:, CHOSEN] - rewards[:, REJECTED], options)
    return losses, torch.stack((slopes, -slopes), 1)


def _of_margin(margins: Tensor, options: PairOptions) -> tuple[Tensor, Tensor]:
    """Losses (P,), and their derivatives (P,) by the margins (P,)."""
    if options.loss is DpoLoss.HINGE:
        return F.relu(1 - margins), -(margins < 1).to(margins.dtype)
    if options.loss is DpoLoss.IPO:
        gaps = (margins - 0.5) / options.beta
        return gaps.square(), 2 * gaps / options.beta
    if not options.smoothing:
        return -F.logsigmoid(margins), -torch.sigmoid(-margins)
    right, wrong = 1 - options.smoothing, options.smoothing
    if options.loss is DpoLoss.ROBUST:
        right, wrong = right / (1 - 2 * options.smoothing), -wrong / (1 - 2 * options.smoothing)
    losses = -right * F.logsigmoid(margins) - wrong * F.logsigmoid(-margins)
    return losses, wrong * torch.sigmoid(margins) - right * torch.sigmoid(-margins)


def sum_by(index: Tensor, values: Tensor, size: int) -> Tensor:
    """Sums of `values` (C,) by `index` (C,), (size,) float64, in an order that never varies (scattered adds on GPUs do)."""
    mine = index.unsqueeze(0) == torch.arange(size, device=index.device).unsqueeze(1)
    return torch.where(mine, values.double(), 0.0).sum(1)
