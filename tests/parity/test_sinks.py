"""Attention sinks on real gloo ranks: every way to spread a sequence, against plain Hugging Face gpt-oss (bounds of test_parity.py)."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from efflaunch.tests.parity.gpt_oss_dense import run_adapted
from efflaunch.tests.parity.reference import reference_loss, reference_model
from efflaunch.tests.parity.test_parity import (
    ADAPTIVE,
    ALL,
    LENGTHS,
    MEMORY_PLANS,
    batch,
    check_parity,
    make_documents,
    plan_of,
    pool,
    reference,
    rms,
    static,
)

__all__ = ["pool"]
FAMILY = "gpt_oss_dense"
SINKS_ONLY = {"trained": ("sinks",)}
PLANS = {
    **MEMORY_PLANS,
    "ulysses 4, more ranks than key/value heads": static(4, 4, 4),
    "hybrid 2x2": static(4, 4, 2),
    "boundaries inside shards": plan_of(4, batch((0, 4, 2, ALL))),
    "documents shorter than the ring": plan_of(4, batch((0, 4, 1, (0, 1, 2))), lengths=(2, 1, 3)),
    "a document shorter than the ulysses group": plan_of(4, batch((0, 4, 4, (0,))), lengths=(3,)),
    "a rank without work": plan_of(4, batch((0, 2, 2, ALL[:3]), (2, 1, 1, ALL[3:]))),
}
OF_MOST = ("keep", "recompute", "streambp", "upipe_stored", "shares_streamed")
ROWS = {
    **{f"{policy}, {name}": ({"policy": policy}, plan) for name, plan in PLANS.items() for policy in OF_MOST},
    "float32, hybrid 2x2": ({"dtype": "float32", "policy": "upipe"}, PLANS["hybrid 2x2"]),
    "memo_1, adaptive, HSDP": ({"policy": "memo_1", "replicate": 2}, plan_of(4, *ADAPTIVE)),
    "segments_3_host, barrier-free, three steps": ({"policy": "segments_3_host", "barrier_free": True, "steps": 3}, plan_of(4, *ADAPTIVE)),
    "keep, accumulation, reduced each time": ({"policy": "keep", "reduce_each": True}, plan_of(4, *ADAPTIVE)),
    **{f"{policy}, sinks only": ({"policy": policy, **SINKS_ONLY}, plan_of(4, *ADAPTIVE)) for policy in ("keep", "streambp")},
    "upipe_stored, sinks frozen": ({"policy": "upipe_stored", "frozen": ("sinks",)}, plan_of(4, *ADAPTIVE)),
}


@pytest.mark.parametrize("row", ROWS)
def test_gradients_equal_plain_hugging_face(pool, row):
    case, plan = ROWS[row]
    check_parity(pool, {"family": FAMILY, **case}, [plan], run=run_adapted)


@pytest.mark.parametrize("policy", ["keep", "streambp"])
def test_bfloat16_is_as_close_to_the_truth_as_plain_bfloat16(pool, policy):
    """All parameters together, and the sinks by themselves."""
    documents, targets = make_documents(LENGTHS)
    weights, _, exact, _ = reference(FAMILY, "float64", LENGTHS, False, 0.0, 0)
    weights = {name: weight.astype(np.float32) for name, weight in weights.items()}
    plain = reference_model(FAMILY, torch.float32)
    with torch.no_grad():
        for name, parameter in plain.named_parameters():
            parameter.copy_(torch.from_numpy(weights[name]))
    plain = plain.to(torch.bfloat16)
    reference_loss(plain, documents, targets).backward()
    theirs = {name: parameter.grad.double().numpy() for name, parameter in plain.named_parameters()}
    sinks = [name for name in exact if name.endswith("sinks")]
    case = {"family": FAMILY, "dtype": "bfloat16", "policy": policy}
    for _, ours in pool.run(run_adapted, case, weights, documents, targets, [static(2, 2, 2), static(2, 2, 1)], 0, ranks=2)[0][0]:
        assert rms(ours, exact) <= 1.1 * rms(theirs, exact)
        assert rms(*({name: side[name] for name in sinks} for side in (ours, exact))) <= 0.05
