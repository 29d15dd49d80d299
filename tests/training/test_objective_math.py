"""The objectives' formulas against autograd and hand-made cases."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

from efflaunch.memory.arena.tracer import StorageTracer
from efflaunch.model.chunked_loss import Head, LossOptions, chunked_log_probs
from efflaunch.parallel.sequence.layout import Slice
from efflaunch.tests.parity.objective_reference import pair_loss, policy_loss
from efflaunch.tests.training.test_loss import Norm
from efflaunch.training.config import DpoLoss, GrpoNormalize, GrpoRatio
from efflaunch.training.data.shard import PackedShard, Part
from efflaunch.training.objectives.heads import Preference
from efflaunch.training.objectives.preference import PairOptions, preference_losses, sum_by
from efflaunch.training.objectives.rollout import RolloutOptions, RolloutRows, rollout_terms, token_divisor

CPU = torch.device("cpu")


def test_preference_slopes_are_the_derivatives():
    torch.manual_seed(0)
    sums, reference = torch.randn(6, 2).double().requires_grad_(), torch.randn(6, 2).double()
    losses = preference_losses(sums, reference, PairOptions(0.3))
    rewards = 0.3 * (sums - reference)
    want = -F.logsigmoid(rewards[:, 0] - rewards[:, 1])
    torch.testing.assert_close(losses.losses, want, rtol=1e-14, atol=0)
    (slopes,) = torch.autograd.grad(want.sum(), sums)
    torch.testing.assert_close(losses.slopes, slopes, rtol=1e-13, atol=0)
    assert losses.stats[:, 1].sum() == (rewards[:, 0] > rewards[:, 1]).sum()


@pytest.mark.parametrize(("loss", "smoothing"), [*((loss, 0.0) for loss in DpoLoss), (DpoLoss.SIGMOID, 0.3), (DpoLoss.ROBUST, 0.3)])
def test_slopes_of_every_pair_loss_are_the_derivatives(loss, smoothing):
    """Against autograd of the formula as it is written."""
    torch.manual_seed(0)
    sums, reference = (3 * torch.randn(20, 2).double()).requires_grad_(), 3 * torch.randn(20, 2).double()
    tokens, options = torch.randint(1, 9, (20, 2)).double(), PairOptions(0.3, loss, smoothing)
    losses = preference_losses(sums.detach(), reference, options, tokens if options.averages else None)
    gains, settings = sums - reference, {"beta": 0.3, "loss": loss.value, "smoothing": smoothing}
    want = torch.stack([pair_loss(gain, count, **settings) for gain, count in zip(gains, tokens, strict=True)])
    (slopes,) = torch.autograd.grad(want.sum(), sums)
    torch.testing.assert_close(losses.losses, want, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(losses.slopes, slopes, rtol=1e-12, atol=1e-14)
    plain = preference_losses(sums.detach(), reference, PairOptions(0.3))
    assert torch.equal(losses.stats, plain.stats), "what is reported means the same for every loss"
    if options.of_margin and not options.averages:
        assert torch.equal(losses.slopes[:, 0], -losses.slopes[:, 1])
    if loss is DpoLoss.HINGE:
        assert 0 < (losses.losses == 0).sum() < 20, "some are beyond it"


def test_slopes_with_fine_tuning_beside_are_the_derivatives():
    torch.manual_seed(0)
    sums, reference = torch.randn(3, 2).double().requires_grad_(), torch.randn(3, 2).double()
    objective = Preference(
        3, CPU, options=PairOptions(0.3, sft_weight=0.2), reference=lambda index: reference[index].numpy(), chosen_tokens=11
    )
    want = torch.stack([pair_loss(gain, None, beta=0.3) for gain in sums - reference]).mean() - 0.2 * sums[:, 0].sum() / 11
    (slopes,) = torch.autograd.grad(want, sums)
    for leads in (True, False):
        loss, got = objective.judge(sums.detach(), reference, None, leads=leads)
        torch.testing.assert_close(loss, leads * want.detach(), rtol=1e-14, atol=0)
        torch.testing.assert_close(got, slopes, rtol=1e-12, atol=1e-14)
    assert not objective.options.of_margin and PairOptions(0.3).of_margin


def test_equal_answers_cost_ln_2():
    losses = preference_losses(torch.zeros(1, 2).double(), torch.zeros(1, 2).double(), PairOptions(0.1))
    assert float(losses.losses) == pytest.approx(math.log(2)) and losses.slopes.tolist() == [[-0.05, 0.05]]


def test_huge_margins_stay_finite():
    losses = preference_losses(torch.tensor([[0.0, 1e6], [1e6, 0.0]]).double(), torch.zeros(2, 2).double(), PairOptions(1.0))
    assert losses.losses.tolist() == [1e6, 0.0] and losses.slopes.tolist() == [[-1.0, 1.0], [0.0, 0.0]]


@pytest.mark.parametrize("weight", [0.0, 0.4])
def test_rollout_slopes_are_the_derivatives(weight):
    torch.manual_seed(1)
    log_probs, old = -torch.rand(200).double().requires_grad_(), -torch.rand(200).double()
    rows = RolloutRows(torch.randn(200).double(), old, -torch.rand(200).double())
    losses = rollout_terms(log_probs.detach(), rows, RolloutOptions(0.2, 0.3, weight))
    ratio = (log_probs - old).exp()
    surrogate = torch.minimum(ratio * rows.advantage, ratio.clamp(0.8, 1.3) * rows.advantage)
    kl = (rows.reference - log_probs).exp() - (rows.reference - log_probs) - 1
    want = -surrogate + weight * kl
    (slopes,) = torch.autograd.grad(want.sum(), log_probs)
    torch.testing.assert_close(losses.terms, want, rtol=1e-13, atol=1e-14)
    torch.testing.assert_close(losses.slopes, slopes, rtol=1e-12, atol=1e-13)
    outside = ((ratio > 1.3) & (rows.advantage > 0)) | ((ratio < 0.8) & (rows.advantage < 0))
    assert losses.stats[:, 1].tolist() == outside.double().tolist() and 0 < outside.sum() < 200
    assert (losses.stats[:, 2] >= 0).all()


@pytest.mark.parametrize("level", GrpoRatio, ids=lambda level: level.value)
@pytest.mark.parametrize("delta", [None, 1.5])
@pytest.mark.parametrize("normalize", GrpoNormalize, ids=lambda normalize: normalize.value)
def test_slopes_of_every_policy_loss_are_the_derivatives(normalize, delta, level):
    """Against autograd of the formula as it is written, one completion at a time."""
    torch.manual_seed(2)
    lengths, advantages = torch.tensor([1, 7, 40, 23]), torch.tensor([0.7, -1.1, 0.4, -0.2]).double()
    owner, shifts = torch.arange(4).repeat_interleave(lengths), torch.tensor([0.05, 0.6, 0.15, -0.4]).double()
    log_probs, reference = (-torch.rand(71).double()).requires_grad_(), -torch.rand(71).double()
    old = log_probs.detach() - shifts[owner] - 0.1 * torch.randn(71).double()
    options = RolloutOptions(0.1, 0.2, 0.3, delta, normalize, 64 if normalize is GrpoNormalize.DR_GRPO else None, level)
    rows = RolloutRows(advantages[owner], old, reference)
    means = torch.stack([(log_probs.detach() - old)[owner == index].mean() for index in range(4)])
    made = rollout_terms(log_probs.detach(), rows, options, means[owner] if level is GrpoRatio.SEQUENCE else None)
    divisor = token_divisor(options, 71, 4, lengths[owner].double())

    want, clipped = 0.0, []
    for index, advantage in enumerate(advantages):
        now, before, initial = (values[owner == index] for values in (log_probs, old, reference))
        settings = {"low": 0.1, "high": 0.2, "weight": 0.3, "delta": delta, "level": level.value}
        terms, (_, lost, _) = policy_loss(now, before, initial, advantage, **settings)
        share = {"dapo": terms.sum() / 71, "grpo": terms.mean() / 4, "dr_grpo": terms.sum() / (4 * 64)}[normalize.value]
        want, clipped = want + share, [*clipped, *lost.tolist()]
    (slopes,) = torch.autograd.grad(want, log_probs)
    torch.testing.assert_close((made.terms / divisor).sum(), want.detach(), rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(made.slopes / divisor, slopes, rtol=1e-12, atol=1e-14)
    assert made.stats[:, 1].tolist() == clipped and 0 < sum(clipped) < 71


def test_the_largest_ratio_holds_negative_advantages_too():
    old, advantage = torch.tensor([-3.0, -3.0, -1.0]).double(), torch.tensor([-1.0, 1.0, -1.0]).double()
    rows, log_probs = RolloutRows(advantage, old, None), torch.tensor([-1.0, -1.0, -0.5]).double()
    loose, held = (rollout_terms(log_probs, rows, RolloutOptions(0.2, 0.2, 0.0, delta)) for delta in (None, 4.0))
    assert loose.terms[0] == pytest.approx(math.exp(2)) and loose.slopes[0] == pytest.approx(math.exp(2))
    assert held.terms.tolist() == [4.0, *loose.terms[1:].tolist()] and held.slopes.tolist() == [0.0, *loose.slopes[1:].tolist()]
    assert loose.stats[:, 1].tolist() == [0, 1, 0] and held.stats[:, 1].tolist() == [1, 1, 0]


def test_the_first_update_on_own_samples_is_the_policy_gradient():
    log_probs, advantage = torch.tensor([-1.0, -2.0]).double(), torch.tensor([0.5, -0.5]).double()
    losses = rollout_terms(log_probs, RolloutRows(advantage, log_probs, None), RolloutOptions(0.2, 0.2, 0.0))
    assert losses.slopes.tolist() == [-0.5, 0.5] and losses.stats.tolist() == [[1.0, 0.0, 0.0]] * 2


def test_sums_by_index():
    assert sum_by(torch.tensor([2, 0, 2]), torch.tensor([1.0, 2.0, 4.0]), 4).tolist() == [2.0, 0.0, 5.0, 0.0]
    assert sum_by(torch.zeros(0, dtype=torch.long), torch.zeros(0), 2).tolist() == [0.0, 0.0]


def pair_head(rows, weight, norm, chunk):
    targets = torch.ones(rows, dtype=torch.long)
    x = (torch.arange(rows * 32).reshape(rows, 32) % 7 - 3).bfloat16().requires_grad_() * 1.0
    return Head(x, norm, weight, targets, LossOptions(chunk), overwrite=True)


def pair_shard(rows, pairs):
    import numpy as np

    each = rows // (2 * pairs)
    parts = tuple(Part(pair, number, number * each, each) for pair in range(pairs) for number in range(2))
    empty = np.zeros(rows, dtype=np.int64)
    return PackedShard(empty, empty, empty, tuple(Slice(index, 0, each) for index in range(2 * pairs)), parts)


@pytest.mark.parametrize("pairs", [1, 2])
def test_preference_needs_bytes_per_row_only(pairs):
    """Beside x: one log-probability, row number and side per row; no second head gradient, no logits of more than one chunk."""
    import numpy as np

    torch.manual_seed(0)
    weight, norm, chunk, peaks = torch.randn(500, 32).bfloat16().requires_grad_(), Norm(32, torch.bfloat16), 64, []
    for rows in (1024, 2048):
        for _ in range(2):
            objective = Preference(pairs, CPU, options=PairOptions(0.1), reference=lambda index: np.zeros(2))
            loss_of = objective.head_loss(pair_shard(rows, pairs), leads=True, group_sum=lambda value: value)
            head = pair_head(rows, weight, norm, chunk)
            with StorageTracer([head.x, head.targets, weight, *norm.parameters()]) as tracer:
                before = tracer.live_bytes
                loss = loss_of(head)
                peak = tracer.peak_bytes - before
                del loss
        peaks.append(peak)
    slope = (peaks[1] - peaks[0]) / 1024
    row_numbers, mask, sides, log_probs = 16, 2, 8, 4
    assert slope <= row_numbers + mask + sides + log_probs
    head_gradient = 4 * 500 * 32 + 2 * 500 * 32
    assert peaks[0] - 1024 * slope <= head_gradient + chunk * (10 * 500 + 24 * 32 + 64) + 4096


def test_log_probabilities_are_those_of_whole_logits():
    torch.manual_seed(0)
    x, weight, norm = torch.randn(31, 12).double(), torch.randn(53, 12).double(), Norm(12)
    targets = torch.randint(0, 53, (31,))
    targets[::3] = -100
    losses = chunked_log_probs(Head(x, norm, weight, targets, LossOptions(7, softcap=3.0)))
    logits = 3 * (F.linear(norm(x), weight) / 3).tanh()
    want = torch.where(targets == -100, 0.0, logits.log_softmax(-1).gather(1, targets.clamp(min=0).unsqueeze(1)).squeeze(1))
    torch.testing.assert_close(losses, want.detach(), rtol=1e-12, atol=1e-12)
    assert not losses.requires_grad


@pytest.mark.parametrize("pairs", [1, 2])
def test_preference_in_bfloat16_is_near_the_truth(pairs):
    """Rows of large and small slopes: gradients are made unscaled where there is one pair, and multiplied at the end."""
    import numpy as np

    torch.manual_seed(0)
    x, weight, targets = torch.randn(64, 32).bfloat16(), (torch.randn(50, 32) / 6).bfloat16(), torch.randint(0, 50, (64,))
    norm, results = Norm(32), []
    norm.weight.data, norm.bias.data = norm.weight.data.bfloat16().double(), norm.bias.data.bfloat16().double()
    for dtype in (torch.float64, torch.bfloat16):
        leaf, w, n = x.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_(), Norm(32, dtype)
        n.load_state_dict({name: value.to(dtype) for name, value in norm.state_dict().items()})
        objective = Preference(pairs, CPU, options=PairOptions(0.05), reference=lambda index: np.array([-70.0, -75.0 + 40 * index]))
        loss_of = objective.head_loss(pair_shard(64, pairs), leads=True, group_sum=lambda value: value)
        loss = loss_of(Head(leaf, n, w, targets, LossOptions(7)))
        loss.backward()
        results.append([t.double() for t in (loss.detach(), leaf.grad, w.grad, n.weight.grad, n.bias.grad)])
    for exact, got in zip(*results, strict=True):
        assert (got - exact).norm() <= 0.02 * exact.norm()
