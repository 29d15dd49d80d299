"""DPO and GRPO by plain torch on a plain Hugging Face model: whole logits, autograd, one document at a time."""

from __future__ import annotations

import numpy as np
import torch
from torch.nn import functional as F


def log_probs(model, tokens):
    """Log-probability of each token after the first under the model, (len - 1,)."""
    ids = torch.as_tensor(tokens).unsqueeze(0)
    logits = model(input_ids=ids, position_ids=torch.arange(ids.shape[1]).unsqueeze(0), use_cache=False).logits[0]
    return logits[:-1].log_softmax(-1).gather(1, ids[0, 1:].unsqueeze(1)).squeeze(1)


def answer(model, tokens, mask):
    """Summed log-probability of the tokens whose mask is set."""
    return log_probs(model, tokens)[torch.as_tensor(mask[1:])].sum()


def fine_tuning(model, documents, smoothing):
    """Mean over all targets of cross-entropy with smoothed labels; `documents`: (tokens, mask)."""
    total, count = 0.0, 0
    for tokens, mask in documents:
        ids, keep = torch.as_tensor(tokens).unsqueeze(0), torch.as_tensor(mask[1:])
        logits = model(input_ids=ids, position_ids=torch.arange(ids.shape[1]).unsqueeze(0), use_cache=False).logits[0, :-1][keep]
        total = total + F.cross_entropy(logits, ids[0, 1:][keep], label_smoothing=smoothing, reduction="sum")
        count += int(keep.sum())
    return total / count


def by_source(model, documents, owners):
    """Sums of -log p over the targets of each source, and how many they are, both over the targets of all."""
    sums, counts = np.zeros(max(owners) + 1), np.zeros(max(owners) + 1)
    with torch.no_grad():
        for (tokens, mask), owner in zip(documents, owners, strict=True):
            sums[owner] -= log_probs(model, tokens).numpy()[mask[1:]].sum()
            counts[owner] += mask[1:].sum()
    return np.concatenate([sums, counts]) / counts.sum()


def pair_loss(gains, tokens, *, beta, loss="sigmoid", smoothing=0.0):
    """Loss of one pair from both answers' gains over the reference in log-probability, and their numbers of tokens."""
    good, bad = beta * gains[0], beta * gains[1]
    if loss == "hinge":
        return torch.clamp(1 - (good - bad), min=0)
    if loss == "ipo":
        return (gains[0] / tokens[0] - gains[1] / tokens[1] - 1 / (2 * beta)) ** 2
    if loss == "sigmoid_norm":
        return torch.log1p(torch.exp(bad / tokens[1] - good / tokens[0]))
    if loss == "apo_zero":
        return 1 - 1 / (1 + torch.exp(-good)) + 1 / (1 + torch.exp(-bad))
    as_labelled, swapped = torch.log1p(torch.exp(bad - good)), torch.log1p(torch.exp(good - bad))
    if loss == "robust":
        return ((1 - smoothing) * as_labelled - smoothing * swapped) / (1 - 2 * smoothing)
    return (1 - smoothing) * as_labelled + smoothing * swapped


def dpo(model, pairs, reference, beta, sft=0.0, **settings):
    """Mean over pairs; `pairs`: ((tokens, mask) chosen, (tokens, mask) rejected), `reference` (P, 2). Also (margins, rewards).

    `sft`: weight of the mean of -log p over the tokens of all chosen answers.
    """
    losses, rewards = [], []
    for halves, before in zip(pairs, reference, strict=True):
        gains = [answer(model, *half) - value for half, value in zip(halves, before, strict=True)]
        losses.append(pair_loss(gains, [int(mask[1:].sum()) for _, mask in halves], beta=beta, **settings))
        rewards.append([beta * float(gain.detach()) for gain in gains])
    loss = torch.stack(losses).mean()
    if sft:
        tokens = torch.cat([log_probs(model, tokens)[torch.as_tensor(mask[1:])] for (tokens, mask), _ in pairs])
        loss = loss - sft * tokens.mean()
    return loss, np.array(rewards)


def policy_loss(now, before, initial, advantage, *, low, high, weight, delta=None, level="token"):
    """Terms (n,) of one completion's tokens; `now`, `before`, `initial`: log-probabilities (n,). Also (ratio, whether clipped, kl)."""
    ratio = (now - before).exp()
    if level == "sequence":
        ratio = (now - before).mean().exp().expand(len(now))
    first = ratio if delta is None else torch.where(ratio > delta, torch.full_like(ratio, delta), ratio)
    gain, clipped = first * advantage, ratio.clamp(1 - low, 1 + high) * advantage
    kl = (initial - now).exp() - (initial - now) - 1
    lost = (clipped < gain) | (ratio > (delta or float("inf")))
    return -torch.minimum(gain, clipped) + weight * kl, (ratio.detach(), lost, kl.detach())


def grpo(model, completions, advantages, old, reference, *, normalize="dapo", length=None, **settings):
    """The loss; `completions`: (tokens, mask), `old` and `reference`: per token. Also means over tokens of (ratio, clipped, kl)."""
    total, count, stats = 0.0, 0, np.zeros(3)
    for (tokens, mask), advantage, before, initial in zip(completions, advantages, old, reference, strict=True):
        keep = torch.as_tensor(mask[1:])
        now, before, initial = (t[keep] for t in (log_probs(model, tokens), torch.as_tensor(before[1:]), torch.as_tensor(initial[1:])))
        terms, numbers = policy_loss(now, before, initial, advantage, **settings)
        total = total + (terms.mean() if normalize == "grpo" else terms.sum())
        stats += [float(number.sum()) for number in numbers]
        count += int(keep.sum())
    divisor = {"dapo": count, "grpo": len(completions), "dr_grpo": len(completions) * (length or 0)}[normalize]
    return total / divisor, stats / count
