"""DeepSpeed's ZeRO under our layers, plans and losses: gradients, norms and updates of plain Hugging Face and AdamW, on gloo ranks.

Its gradients and weights are float32 whatever the model computes in, so bounds are float32's. AdamW divides gradients by their own
size: of one that is next to nothing the update is noise, for plain torch too. So updates are judged by how many numbers are off by
more than a hundredth of the learning rate: one or two of 76,000 when all is right, more than half of them where decay is lost.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import pytest
import torch

from efflaunch.parallel.sequence.plan import StepPlan
from efflaunch.parallel.sharding.ds_config_keys import PASSED, ZERO
from efflaunch.tests.parity.engines_side import run_with_forwards, run_zero, run_zero_objective
from efflaunch.tests.parity.reference import reference_loss, reference_model
from efflaunch.tests.parity.test_objectives import LENGTHS as OBJECTIVE_LENGTHS
from efflaunch.tests.parity.test_objectives import singles, truth
from efflaunch.tests.parity.test_parity import batch, make_documents, plan_of, reference, rms, worst
from efflaunch.tests.ranks import RankPool
from efflaunch.training.optimizers.adamw import is_decayed

LENGTHS = (37, 5, 64, 18, 29)
RATES = (3e-3, 2e-3)
BOUND = 4e-6
ULYSSES = plan_of(2, batch((0, 2, 2, (0, 1, 2, 3, 4))))
UNEQUAL = plan_of(2, batch((0, 1, 1, (2,)), (1, 1, 1, (1, 3))), batch((0, 2, 1, (0,))), batch((1, 1, 1, (4,))))
"""Three micro-batches: unequal groups of one, a ring over both ranks, and one with an idle rank."""


@pytest.fixture(scope="module")
def pool():
    with RankPool() as pool:
        yield pool


@lru_cache(maxsize=8)
def plain(family: str, clip: float | None):
    """First weights, loss, gradients, norms, and weights after steps at RATES of the plain model."""
    model = reference_model(family, torch.float32)
    owners = {parameter: module for module in reversed(list(model.modules())) for parameter in module.parameters(recurse=False)}
    first = {name: parameter.detach().numpy().copy() for name, parameter in model.named_parameters()}
    decayed = {parameter: is_decayed(owners[parameter], parameter) for parameter in model.parameters()}
    groups = [{"params": [p for p in decayed if decayed[p] == kind], "weight_decay": 0.3 * kind} for kind in (True, False)]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-8, foreach=False)
    losses, norms, gradients = [], [], None
    for rate in RATES:
        optimizer.zero_grad()
        loss = reference_loss(model, *make_documents(LENGTHS))
        loss.backward()
        gradients = gradients or {name: parameter.grad.numpy().copy() for name, parameter in model.named_parameters()}
        losses.append(loss.item())
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), clip or 1e9)))
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
    return first, losses, gradients, norms, {name: parameter.detach().numpy().copy() for name, parameter in model.named_parameters()}


def off(got, want):
    """Numbers that are off by more than a hundredth of the smallest learning rate, and of how many."""
    return sum(int((np.abs(got[name] - want[name]) > 0.01 * min(RATES)).sum()) for name in want), sum(each.size for each in want.values())


def check_zero(
    pool: RankPool, stage: int, policy: str, family: str = "llama", clip: float | None = None, plans=(ULYSSES, UNEQUAL), **engine
) -> None:
    first, losses, gradients, norms, trained = plain(family, clip)
    documents, targets = make_documents(LENGTHS)
    case = {"stage": stage, "policy": policy, "family": family, "dtype": "float32", "optim": {"grad_clip": clip}, **engine}
    passes, steps, ours = pool.run(run_zero, case, first, documents, targets, list(plans), RATES, ranks=2)[0]
    for plan, (loss, got, norm) in zip(plans, passes, strict=True):
        assert loss == pytest.approx(losses[0], rel=1e-6)
        error, name = worst(got, gradients)
        assert error <= BOUND, f"{plan}: gradient of {name} is off by {error:.1e}"
        assert norm == pytest.approx(norms[0], rel=1e-6), "the norm is known before the update"
    assert [loss for loss, _ in steps] == pytest.approx(losses, rel=1e-5)
    assert [norm for _, norm in steps] == pytest.approx(norms, rel=1e-5)
    wrong, total = off(ours, trained)
    assert wrong <= 1e-3 * total, f"{wrong} of {total} numbers are off by more than 1 % of the learning rate"


@pytest.mark.parametrize("policy", ["recompute", "keep", "segments_2", "shares_streamed"])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_zero_has_the_gradients_and_updates_of_plain_hugging_face(pool: RankPool, stage: int, policy: str) -> None:
    """With one micro-batch over both ranks, and with several of unequal groups, one of them with an idle rank."""
    check_zero(pool, stage, policy, "llama_deep" if policy in ("segments_2", "shares_streamed") else "llama")


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_clipped_and_accumulated_with_tied_embeddings(pool: RankPool, stage: int) -> None:
    assert plain("llama_mha_tied", None)[3][0] > 2 * 0.5, "clipping would do nothing"
    check_zero(pool, stage, "recompute", "llama_mha_tied", clip=0.5, plans=(UNEQUAL, ULYSSES))


PASSED_ON = {
    1: {
        "reduce_bucket_size": 100,
        "allgather_bucket_size": 100,
        "allgather_partitions": False,
        "reduce_scatter": False,
        "overlap_comm": True,
    },
    2: {"reduce_bucket_size": 100, "contiguous_gradients": False, "use_multi_rank_bucket_allreduce": False},
    3: {
        "reduce_bucket_size": 100,
        "sub_group_size": 5000,
        "overlap_comm": True,
        "contiguous_gradients": False,
        "reduce_scatter": False,
        "stage3_prefetch_bucket_size": 10**9,
        "stage3_max_live_parameters": 10**9,
        "stage3_max_reuse_distance": 10**9,
        "stage3_param_persistence_threshold": 100,
        "stage3_model_persistence_threshold": 1000,
        "stage3_use_all_reduce_for_fetch_params": True,
        "stage3_allgather_sequential": True,
        "log_trace_cache_warnings": True,
    },
}
"""Everything that a ds_config.json may send to DeepSpeed, each as far from what is chosen here as it goes."""


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_what_a_users_file_sends_to_deepspeed_changes_no_number(pool: RankPool, stage: int) -> None:
    check_zero(pool, stage, "recompute", clip=0.5, zero=PASSED_ON[stage])


def test_every_key_that_is_sent_is_tried() -> None:
    sent = {row.name.removeprefix(ZERO) for row in PASSED if row.sent_as is None}
    assert sent == set().union(*PASSED_ON.values())


@pytest.mark.parametrize("stage", [1, 3])
def test_experts_under_zero(pool: RankPool, stage: int) -> None:
    """All experts on every rank: stacks of matrices are flattened as matrices are."""
    check_zero(pool, stage, "recompute", "qwen3_moe", plans=(UNEQUAL,))


@pytest.mark.parametrize("stage", [1, 3])
def test_router_losses_weigh_what_they_should(pool: RankPool, stage: int) -> None:
    """Their gradients do not come through the loss, which stage 3 has multiplied by the number of ranks."""
    documents, targets = make_documents(LENGTHS)
    router = (0.3, 0.05)
    model = reference_model("qwen3_moe", torch.float32)
    reference_loss(model, documents, targets, router=router).backward()
    want = {name: parameter.grad.numpy() for name, parameter in model.named_parameters()}
    without = plain("qwen3_moe", None)[2]
    assert worst(without, want)[0] > 1e3 * BOUND, "they would not be seen"
    case = {"stage": stage, "policy": "recompute", "family": "qwen3_moe", "dtype": "float32", "router": router}
    passes, _, _ = pool.run(run_zero, case, plain("qwen3_moe", None)[0], documents, targets, [UNEQUAL], RATES, ranks=2)[0]
    error, name = worst(passes[0][1], want)
    assert error <= BOUND, f"gradient of {name} is off by {error:.1e}"


@pytest.mark.parametrize(("stage", "objective"), [(1, "dpo"), (2, "dpo"), (3, "dpo"), (3, "grpo")])
def test_objectives_under_zero(pool: RankPool, stage: int, objective: str) -> None:
    """Pairs are scored before their gradients begin, rollouts are not; one sequence a micro-batch, over both ranks."""
    weights, options, loss, _, gradients = truth("llama", objective)
    narrow = {name: weight.astype(np.float32) for name, weight in weights.items()}
    degree, *batches = singles(objective, 2, 2)
    plan = StepPlan(degree, OBJECTIVE_LENGTHS[objective], tuple(batches))
    case = {"stage": stage, "policy": "recompute", "family": "llama", "dtype": "float32"}
    got_loss, got, norm = pool.run(run_zero_objective, objective, case, narrow, options, plan, ranks=2)[0]
    assert got_loss == pytest.approx(loss, rel=1e-5)
    error, name = worst(got, gradients)
    assert error <= 10 * BOUND, f"gradient of {name} is off by {error:.1e}"
    assert norm == pytest.approx(sum(float(np.square(each).sum()) for each in gradients.values()) ** 0.5, rel=1e-5)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_bfloat16_is_as_close_to_the_truth_as_plain_bfloat16(pool: RankPool, stage: int) -> None:
    """bfloat16 compute, float32 weights, gradients and reduction: the error against float64 is that of Hugging Face in bfloat16."""
    documents, targets = make_documents(LENGTHS)
    weights, loss, exact, _ = reference("llama", "float64", LENGTHS, False, 0.0, 0)
    weights = {name: weight.astype(np.float32) for name, weight in weights.items()}
    plain_model = reference_model("llama", torch.float32)
    with torch.no_grad():
        for name, parameter in plain_model.named_parameters():
            parameter.copy_(torch.from_numpy(weights[name]))
    plain_model = plain_model.to(torch.bfloat16)
    reference_loss(plain_model, documents, targets).backward()
    theirs = {name: parameter.grad.double().numpy() for name, parameter in plain_model.named_parameters()}
    case = {"stage": stage, "policy": "recompute", "family": "llama", "dtype": "bfloat16"}
    passes, steps, trained = pool.run(run_zero, case, weights, documents, targets, [ULYSSES, UNEQUAL], RATES, ranks=2)[0]
    got_loss, ours, norm = passes[0]
    assert abs(got_loss - loss) < 1e-2 * loss and all(gradient.dtype == np.float32 for gradient in ours.values())
    assert rms(ours, exact) <= 1.1 * rms(theirs, exact)
    assert rms(passes[1][1], exact) <= 1.1 * rms(theirs, exact), "several micro-batches of unequal groups, one with an idle rank"
    assert norm == pytest.approx(sum(float(np.square(each.astype(np.float64)).sum()) for each in ours.values()) ** 0.5, rel=1e-6)
    # Updates are of float32 weights: their last bits are not bfloat16's.
    rounded = {name: torch.from_numpy(each).bfloat16().float().numpy() for name, each in trained.items()}
    assert steps[1][0] < steps[0][0] and any(not np.array_equal(trained[name], rounded[name]) for name in trained)


@pytest.mark.parametrize("stage", [1, 3])
def test_forward_passes_alone_between_steps_change_nothing(pool: RankPool, stage: int) -> None:
    """As evaluations and scores make them: no gradient, no gathered weight and no order of modules is left behind."""
    case = {"stage": stage, "policy": "recompute", "family": "llama", "dtype": "float32"}
    plain_steps, looked = pool.run(run_with_forwards, case, plain("llama", None)[0], *make_documents(LENGTHS), UNEQUAL, RATES, ranks=2)[0]
    assert plain_steps == looked and looked[1][0] < looked[0][0]
