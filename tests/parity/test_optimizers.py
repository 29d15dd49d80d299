"""Three optimizer steps on real gloo ranks, wherever the states live and whenever they are updated, against one plain process.

The reference is torch's AdamW, not fused, on a plain Hugging Face model. Exact modes agree to 1e-10 in float64; host and device
states, and both ways of clipping by the step's own norm, are bit-equal to each other.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import pytest
import torch

from efflaunch.parallel.pipeline.config import PipelineOrder
from efflaunch.tests.parity.optimizers_side import RATES, run_updates
from efflaunch.tests.parity.reference import lift_to_float64, reference_loss, reference_model
from efflaunch.tests.parity.test_parity import ADAPTIVE, batch, make_documents, plan_of, static, worst
from efflaunch.tests.ranks import RankPool
from efflaunch.training.optimizers.adamw import is_decayed

LENGTHS = (37, 5, 64, 18, 29)
CLIP = 0.5
ACCUMULATED = (2, *(batch((0, 2, 2, (i,))) for i in (0, 1, 2)), batch((0, 1, 1, (3,)), (1, 1, 1, (4,))))
LAYOUTS = {
    "one rank": (1, {}, lambda: static(1, 1, 1)),
    "two ranks": (2, {}, lambda: static(2, 2, 2)),
    "hsdp 2x2": (4, {"replicate": 2}, lambda: static(4, 2, 2)),
    "accumulation, reduced once": (2, {}, lambda: plan_of(*ACCUMULATED)),
    "accumulation, reduced each time": (2, {"reduce_each": True}, lambda: plan_of(*ACCUMULATED)),
    "barrier-free": (4, {"barrier_free": True}, lambda: plan_of(4, *ADAPTIVE)),
    "two stages": (4, {"stages": 2}, lambda: plan_of(*ACCUMULATED)),
    "two stages, GPipe, reduced each time": (
        4, {"stages": 2, "order": PipelineOrder.GPIPE, "family": "llama_deep", "reduce_each": True}, lambda: plan_of(*ACCUMULATED),
    ),
    "tied embeddings, segments": (2, {"family": "llama_mha_tied", "policy": "segments_2"}, lambda: static(2, 2, 2)),
}
EXACT = {
    "device, step": {},
    "device, step, clipped": {"grad_clip": CLIP},
    "device, backward": {"update": "backward"},
    "device, backward, two passes": {"update": "backward", "grad_clip": CLIP, "clip_mode": "two_pass"},
    "host, step": {"state_device": "host"},
    "host, step, clipped": {"state_device": "host", "grad_clip": CLIP},
    "host, backward": {"state_device": "host", "update": "backward"},
    "host, backward, two passes": {"state_device": "host", "update": "backward", "grad_clip": CLIP, "clip_mode": "two_pass"},
}


INCOMPLETE = {
    "tied embeddings": (4, {"stages": 2, "family": "llama_mha_tied"}, lambda: plan_of(*ACCUMULATED)),
    "interleaved": (
        4, {"stages": 2, "virtual": 2, "order": PipelineOrder.INTERLEAVED, "family": "llama_deep", "reduce_each": True},
        lambda: plan_of(*ACCUMULATED),
    ),
}
"""Two stages whose gradients are not all complete with the last backward pass: they are not taken within it."""


@pytest.fixture(scope="module")
def pool():
    with RankPool() as pool:
        yield pool


@lru_cache(maxsize=8)
def plain(family, dtype, clip, previous=False):
    """First weights, losses, norms before clipping, and weights after three steps of the plain model."""
    if dtype == "float64":
        lift_to_float64()
    model = reference_model(family, getattr(torch, dtype))
    owners = {parameter: module for module in reversed(list(model.modules())) for parameter in module.parameters(recurse=False)}
    first = {name: parameter.detach().numpy().copy() for name, parameter in model.named_parameters()}
    groups = [
        {"params": [p for p in model.parameters() if is_decayed(owners[p], p) == decayed], "weight_decay": 0.3 * decayed}
        for decayed in (True, False)
    ]
    optimizer = torch.optim.AdamW(groups, lr=RATES[0], betas=(0.9, 0.95), eps=1e-8, foreach=False)
    losses, norms = [], []
    for rate in RATES:
        optimizer.zero_grad()
        loss = reference_loss(model, *make_documents(LENGTHS))
        loss.backward()
        losses.append(loss.item())
        norms.append(torch.nn.utils.get_total_norm([p.grad for p in model.parameters()]).item())
        used = norms[-2] if previous and len(norms) > 1 else norms[-1]
        for p in model.parameters():
            p.grad.mul_(min(1.0, clip / (used + 1e-6)) if clip else 1.0)
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
    return first, losses, norms, {name: parameter.detach().numpy().copy() for name, parameter in model.named_parameters()}


def run(pool, layout, optim, dtype="float64"):
    ranks, case, plan = {**LAYOUTS, **INCOMPLETE}[layout]
    case = {"family": "llama", "dtype": dtype, **case}
    weights = plain(case["family"], "float64" if dtype == "float64" else "float32", None)[0]
    documents, targets = make_documents(LENGTHS)
    return pool.run(run_updates, case, weights, documents, targets, plan(), optim, ranks=ranks)[0]


@pytest.mark.parametrize("mode", EXACT)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_three_steps_equal_plain_adamw(pool, layout, mode):
    optim = EXACT[mode]
    check_three_steps(pool, layout, optim, LAYOUTS[layout][1].get("family", "llama"))


@pytest.mark.parametrize("mode", ["device, step", "device, step, clipped"])
@pytest.mark.parametrize("layout", INCOMPLETE)
def test_every_weight_counts_once_in_the_norm_of_two_stages(pool, layout, mode):
    check_three_steps(pool, layout, EXACT[mode], INCOMPLETE[layout][1]["family"])


def check_three_steps(pool, layout, optim, family):
    _, losses, norms, trained = plain(family, "float64", optim.get("grad_clip"))
    assert norms[0] > 2 * CLIP, "clipping would do nothing"
    got_losses, got_norms, weights, model, _ = run(pool, layout, optim)
    assert got_losses == pytest.approx(losses, rel=1e-10)
    assert got_norms == pytest.approx(norms, rel=1e-10)
    error, name = worst(weights, trained)
    assert error <= 1e-10, f"{name} is off by {error:.1e}"
    assert all(np.array_equal(model[name], weights[name]) for name in weights), "the model's weights are the updated ones"


def test_the_previous_norm_is_exact_in_the_first_step_and_says_what_it_does_after(pool):
    _, losses, norms, trained = plain("llama", "float64", CLIP, True)
    for states in ("device", "host"):
        optim = {"state_device": states, "update": "backward", "grad_clip": CLIP, "clip_mode": "previous_norm"}
        got_losses, got_norms, weights, _, _ = run(pool, "two ranks", optim)
        assert got_losses == pytest.approx(losses, rel=1e-10) and got_norms == pytest.approx(norms, rel=1e-10)
        assert worst(weights, trained)[0] <= 1e-10


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("layout", ["two ranks", "hsdp 2x2", "accumulation, reduced once", "accumulation, reduced each time"])
@pytest.mark.parametrize("clip", [None, CLIP], ids=["not clipped", "clipped"])
def test_host_and_device_and_every_exact_mode_are_bit_equal(pool, layout, dtype, clip):
    """bfloat16: the device then has bfloat16 weights only, and gradients come to the host in float32 all the same."""
    want = run(pool, layout, {"grad_clip": clip}, dtype)
    backward = {"update": "backward", "grad_clip": clip, "clip_mode": "two_pass" if clip else "global"}
    for optim in ({"state_device": "host", "grad_clip": clip}, backward, {"state_device": "host", **backward}):
        got = run(pool, layout, optim, dtype)
        assert got[0] == want[0] and got[1] == want[1], optim
        for mine, theirs in ((got[2], want[2]), (got[4], want[4])):
            assert mine.keys() == theirs.keys()
            assert all(mine[key].dtype == theirs[key].dtype and np.array_equal(mine[key], theirs[key]) for key in theirs), optim
        if optim.get("state_device") == "host":
            rounded = {name: torch.from_numpy(w).to(getattr(torch, dtype)).float().numpy() for name, w in got[2].items()}
            assert all(np.array_equal(got[3][name], rounded[name]) for name in rounded)
