"""DPO and GRPO on real gloo ranks against plain torch on a plain Hugging Face model: loss, every gradient and the reported means.

Float64, 1e-10 relative to the largest entry of each tensor, as in test_parity.py; one rank, Ulysses, ring, mixed groups, ranks
without work, accumulation, several pairs in one group, chunk sizes that do not divide.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import pytest
import torch

from efflaunch.parallel.sequence.plan import Group, MicroBatch, StepPlan, check_plan
from efflaunch.tests.parity import objective_reference
from efflaunch.tests.parity.objective_ranks import run_objective
from efflaunch.tests.parity.reference import BASE, lift_to_float64, reference_model
from efflaunch.tests.ranks import RankPool

BETA, CLIP = 0.7, {"low": 0.15, "high": 0.3, "weight": 0.2}
NARROW = {"low": 0.03, "high": 0.04}
"""Clips of ratios of sequences, whose tokens' even out."""
PAIRS = ((7, 12, 19), (5, 21, 3), (11, 4, 17), (2, 30, 26))
"""(prompt, chosen, rejected) tokens."""
COMPLETIONS = ((7, 12), (7, 19), (5, 33), (11, 2), (3, 24))
"""(prompt, completion) tokens."""


@pytest.fixture(scope="module")
def pool():
    with RankPool() as pool:
        yield pool


def document(generator, prompt, completion):
    tokens = generator.integers(0, BASE["vocab_size"], prompt + completion)
    return tokens, np.arange(prompt + completion) >= prompt


@lru_cache(maxsize=8)
def pairs():
    generator, out = np.random.default_rng(3), []
    for prompt, chosen, rejected in PAIRS:
        first, second = document(generator, prompt, chosen), document(generator, prompt, rejected)
        second[0][:prompt] = first[0][:prompt]
        out.append((first, second))
    # Near what the model gives, so that margins are of either sign and no sigmoid is flat.
    return out, -np.log(BASE["vocab_size"]) * np.array([[c, r] for _, c, r in PAIRS]) + generator.normal(0, 2, (len(PAIRS), 2)) - 5


@lru_cache(maxsize=8)
def completions():
    generator = np.random.default_rng(4)
    docs = [document(generator, *sizes) for sizes in COMPLETIONS]
    return docs, generator.normal(0, 1, len(docs))


def near(model, docs, spread, seed):
    """Log-probabilities around the model's own: ratios on both sides of the clip."""
    generator = np.random.default_rng(seed)
    with torch.no_grad():
        return [
            np.append(0.0, objective_reference.log_probs(model, tokens).numpy() + generator.normal(0, spread, len(tokens) - 1))
            for tokens, _ in docs
        ]


@lru_cache(maxsize=16)
def truth(family, objective, variant=None):
    """Weights, what the ranks are told, loss, means, gradients. `variant`: settings other than the objective's default, of VARIANTS."""
    lift_to_float64()
    model = reference_model(family, torch.float64)
    weights = {name: parameter.detach().numpy().copy() for name, parameter in model.named_parameters()}
    if objective == "fine-tuning":
        settings = VARIANTS["fine-tuning"].get(variant, {})
        options, means = {"documents": completions()[0], "smoothing": settings.get("smoothing", 0.1)}, []
        loss = objective_reference.fine_tuning(model, **options)
        if settings:
            means, options = objective_reference.by_source(model, options["documents"], settings["owners"]), options | settings
    elif objective == "dpo":
        halves, reference = pairs()
        settings = {"beta": BETA, **VARIANTS["dpo"].get(variant, {})}
        loss, rewards = objective_reference.dpo(model, halves, reference, **settings)
        margins = rewards[:, 0] - rewards[:, 1]
        assert 0 < (margins > 0).sum() < len(margins), "both outcomes"
        means = [margins.mean(), (margins > 0).mean(), *rewards.mean(0)]
        options = {"documents": halves, "reference": reference, **settings}
    else:
        docs, advantages = completions()
        old, reference = near(model, docs, 0.3, 1), near(model, docs, 0.5, 2)
        settings = {**CLIP, **VARIANTS["grpo"].get(variant, {})}
        loss, means = objective_reference.grpo(model, docs, advantages, old, reference, **settings)
        assert 0.1 < means[1] < 0.9, "some tokens are clipped"
        options = {"documents": docs, "advantages": advantages, "old": old, "reference": reference, **settings}
    loss.backward()
    gradients = {name: parameter.grad.numpy().copy() for name, parameter in model.named_parameters()}
    return weights, options, loss.item(), np.array(means), gradients


VARIANTS = {
    "fine-tuning": {
        "sources": {"owners": (1, 0, 2, 1, 0), "smoothing": 0.0},
        "sources, smoothed": {"owners": (0, 0, 1, 0, 1), "smoothing": 0.1},
    },
    "dpo": {
        "conservative": {"smoothing": 0.2},
        "robust": {"loss": "robust", "smoothing": 0.2},
        "hinge": {"loss": "hinge", "beta": 0.1},
        "ipo": {"loss": "ipo"},
        "length-normalised": {"loss": "sigmoid_norm"},
        "apo_zero": {"loss": "apo_zero", "beta": 0.1},
        "with fine-tuning": {"sft": 0.3},
        "ipo with fine-tuning": {"loss": "ipo", "sft": 0.3},
    },
    "grpo": {
        "per completion": {"normalize": "grpo"},
        "fixed length": {"normalize": "dr_grpo", "length": 40},
        "two-sided": {"delta": 1.4},
        "ratios of sequences": {"level": "sequence", **NARROW},
        "ratios of sequences, per completion, two-sided": {"level": "sequence", "normalize": "grpo", "delta": 1.05, **NARROW},
    },
}
LENGTHS = {
    "fine-tuning": tuple(p + c for p, c in COMPLETIONS),
    "dpo": tuple(2 * p + c + r for p, c, r in PAIRS),
    "grpo": tuple(p + c for p, c in COMPLETIONS),
}
ALL = {"fine-tuning": (0, 1, 2, 3, 4), "dpo": (0, 1, 2, 3), "grpo": (0, 1, 2, 3, 4)}


def batch(*groups):
    return MicroBatch(tuple(Group(*group) for group in groups))


def whole(objective, degree, ulysses):
    """Everything in one group."""
    return [degree, batch((0, degree, ulysses, ALL[objective]))]


def singles(objective, degree, ulysses):
    """One sequence a micro-batch."""
    return [degree, *(batch((0, degree, ulysses, (index,))) for index in ALL[objective])]


ROWS = {
    "one rank": (whole, 1, 1, {}),
    "one rank, chunk of 1": (whole, 1, 1, {"loss_chunk": 1}),
    "one rank, one sequence a micro-batch": (singles, 1, 1, {}),
    "ulysses 2": (whole, 2, 2, {}),
    "ulysses 2, one sequence a micro-batch": (singles, 2, 2, {"loss_chunk": 5}),
    "ring 2": (whole, 2, 1, {}),
    "ring 2, one sequence a micro-batch, recompute": (singles, 2, 1, {"policy": "recompute", "loss_chunk": 1000}),
    "ulysses 2, streambp": (whole, 2, 2, {"policy": "streambp"}),
    "hybrid 2x2, gemma2": (whole, 4, 2, {"family": "gemma2"}),
    "hybrid 2x2, tied, one sequence a micro-batch": (singles, 4, 2, {"family": "llama_mha_tied"}),
    "two stages, one sequence a micro-batch": (singles, 1, 1, {"stages": 2}),
    "two stages, ulysses 2, tied, recompute": (singles, 2, 2, {"stages": 2, "family": "llama_mha_tied", "policy": "recompute"}),
}


@pytest.mark.parametrize("objective", ["dpo", "grpo"])
@pytest.mark.parametrize("row", ROWS, ids=str)
def test_objectives_equal_plain_torch(pool, row, objective):
    made, degree, ulysses, case = ROWS[row]
    world, *batches = made(objective, degree, ulysses)
    check_objective(pool, objective, StepPlan(world, LENGTHS[objective], tuple(batches)), case)


@pytest.mark.parametrize("barrier_free", [False, True])
@pytest.mark.parametrize("objective", ["dpo", "grpo"])
def test_mixed_groups_and_ranks_without_work(pool, objective, barrier_free):
    rest = ALL[objective][2:]
    batches = batch((0, 2, 1, (1,)), (2, 1, 1, (0,))), batch((0, 4, 2, rest[:1])), batch((2, 2, 2, rest[1:]))
    check_objective(pool, objective, StepPlan(4, LENGTHS[objective], batches), {"barrier_free": barrier_free})


@pytest.mark.parametrize("row", ["one rank, chunk of 1", "ulysses 2, one sequence a micro-batch", "ring 2"])
@pytest.mark.parametrize(("objective", "variant"), [(objective, name) for objective in ("dpo", "grpo") for name in VARIANTS[objective]])
def test_variants_equal_plain_torch(pool, objective, variant, row):
    """Several pairs in one group and one alone: with one number for all its gradients, or two."""
    made, degree, ulysses, case = ROWS[row]
    world, *batches = made(objective, degree, ulysses)
    check_objective(pool, objective, StepPlan(world, LENGTHS[objective], tuple(batches)), case, variant)


@pytest.mark.parametrize("row", ["one rank, chunk of 1", "ring 2", "hybrid 2x2, gemma2", "two stages, ulysses 2, tied, recompute"])
def test_smoothed_labels_equal_plain_torch(pool, row):
    made, degree, ulysses, case = ROWS[row]
    world, *batches = made("fine-tuning", degree, ulysses)
    check_objective(pool, "fine-tuning", StepPlan(world, LENGTHS["fine-tuning"], tuple(batches)), case)


def test_losses_of_sources_are_exact_sums(pool):
    """Of whatever ranks hold the rows; without smoothed labels they add up to the loss."""
    for row in ("one rank, chunk of 1", "ring 2", "hybrid 2x2, gemma2", "two stages, ulysses 2, tied, recompute"):
        made, degree, ulysses, case = ROWS[row]
        world, *batches = made("fine-tuning", degree, ulysses)
        check_objective(pool, "fine-tuning", StepPlan(world, LENGTHS["fine-tuning"], tuple(batches)), case, "sources")
    batches = batch((0, 2, 1, (1,)), (2, 1, 1, (0,))), batch((0, 4, 2, (2,))), batch((2, 2, 2, (3, 4)))
    plan = StepPlan(4, LENGTHS["fine-tuning"], batches)
    for variant in VARIANTS["fine-tuning"]:
        check_objective(pool, "fine-tuning", plan, {"barrier_free": True}, variant)
    _, _, loss, means, _ = truth("llama", "fine-tuning", "sources")
    assert abs(means[:3].sum() - loss) <= 1e-12 * loss


def check_objective(pool, objective, plan, case, variant=None):
    check_plan(plan)
    case = {"family": "llama", "loss_chunk": 7, **case}
    weights, options, loss, means, gradients = truth(case["family"], objective, variant)
    ranks = plan.world_size * case.get("stages", 1)
    got_loss, got_means, got = pool.run(run_objective, objective, case, weights, options, plan, ranks=ranks)[0]
    assert abs(got_loss - loss) <= 1e-10 * abs(loss)
    np.testing.assert_allclose(got_means, means, rtol=1e-10, atol=1e-12)
    for name, want in gradients.items():
        error = np.abs(got[name] - want).max() / np.abs(want).max()
        assert error <= 1e-10, f"gradient of {name} is off by {error:.1e}"
