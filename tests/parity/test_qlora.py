"""QLoRA through the executor against peft on a plain Hugging Face model whose matrices hold the same quantised numbers.

Float64 rows agree to 1e-10. Packed matrices have no gradient.
"""

from __future__ import annotations

import pytest
import torch

from efflaunch.tests.parity.nf4_reference import packed_and_plain, qlora
from efflaunch.tests.parity.optimizers_side import RATES, run_updates
from efflaunch.tests.parity.peft_reference import Truth, arrays, check_row
from efflaunch.tests.parity.reference import reference_loss
from efflaunch.tests.parity.test_parity import ADAPTIVE, LENGTHS, batch, make_documents, plan_of, static, worst
from efflaunch.tests.ranks import RankPool

ALL = qlora()
TRUTH = Truth(packed_and_plain)
ROWS = {
    "packed attention, adapters on the mlp": (
        "llama", qlora(targets=["mlp"], quantized=["attention"]), "chunks_16_keep_attention", {}, lambda: [static(1, 1, 1)],
    ),
    "norms and head trained": (
        "llama", qlora(targets=["v_proj", "down_proj"], modules_to_save=["norms", "head"]), "chunks_5", {}, lambda: [static(2, 2, 1)],
    ),
    "tied embeddings": ("llama_mha_tied", ALL, "recompute", {}, lambda: [static(2, 2, 2)]),
    "biases": ("qwen2", ALL, "streambp", {}, lambda: [static(2, 2, 2)]),
    "fused matrices": ("phi3", ALL, "upipe", {}, lambda: [static(2, 2, 2)]),
    "norms of heads": ("qwen3", ALL, "upipe", {}, lambda: [static(2, 2, 2)]),
    "attention beside experts": (
        "mixtral", qlora(targets=["attention"], quantized=["attention"]), "recompute", {}, lambda: [static(1, 1, 1)],
    ),
    **{
        f"{policy}, alone, ulysses 2, ring 2": ("llama_deep", ALL, policy, {}, lambda: [static(2, 1, 1), static(2, 2, 2), static(2, 2, 1)])
        for policy in ("keep", "recompute", "keep_attention", "alst", "memo_0.3", "upipe_stored", "segments_2", "everything kept by class")
    },
    **{
        f"{policy}, mixed groups, accumulation": ("llama_deep", ALL, policy, {}, lambda: [plan_of(4, *ADAPTIVE)])
        for policy in ("keep", "shares_streamed")
    },
    **{
        f"magnitudes, {policy}": ("llama", qlora(dora=True), policy, {}, lambda: [static(2, 2, 2)])
        for policy in ("keep", "shares_streamed")
    },
    "barrier-free": ("llama", ALL, "recompute", {"barrier_free": True, "replicate": 2}, lambda: [plan_of(4, *ADAPTIVE)]),
    "accumulation, reduced each time": (
        "llama", ALL, "alst", {"reduce_each": True}, lambda: [plan_of(2, *(batch((0, 2, 2, (i,))) for i in range(len(LENGTHS))))],
    ),
    "compiled": ("llama", ALL, "chunks_16", {"compile": "aot_eager"}, lambda: [static(1, 1, 1)]),
    "compiled, kept": ("llama", ALL, "keep", {"compile": "aot_eager"}, lambda: [static(1, 1, 1)]),
    "2 stages": (
        "llama_deep", ALL, "streambp", {"stages": 2}, lambda: [plan_of(1, *(batch((0, 1, 1, (i,))) for i in range(len(LENGTHS))))],
    ),
}  # fmt: skip
LONG = ("compiled", "upipe_stored, alone, ulysses 2, ring 2", "segments_2, alone, ulysses 2, ring 2")


@pytest.fixture(scope="module")
def pool():
    with RankPool() as pool:
        yield pool


@pytest.mark.parametrize("row", [pytest.param(row, marks=pytest.mark.slow if row in LONG else ()) for row in ROWS])
def test_gradients_equal_peft_on_the_same_quantised_weights(pool, row):
    check_row(pool, TRUTH, ROWS[row])


@pytest.mark.parametrize("optim", [{"update": "backward"}, {"state_device": "host"}], ids=["device, backward", "host"])
def test_three_steps_equal_plain_adamw_and_leave_the_bytes_as_they_were(pool, optim):
    first, model, named = packed_and_plain("llama", "float64", ALL)
    trained = [p for p in named.values() if p.requires_grad]
    optimizer, losses = torch.optim.AdamW(trained, lr=RATES[0], betas=(0.9, 0.95), eps=1e-8, weight_decay=0.3, foreach=False), []
    for rate in RATES:
        optimizer.zero_grad()
        loss = reference_loss(model, *make_documents(LENGTHS))
        loss.backward()
        losses.append(loss.item())
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
    case = {"family": "llama", "dtype": "float64", "adapter": ALL}
    got_losses, _, weights, _, _ = pool.run(run_updates, case, first, *make_documents(LENGTHS), static(2, 2, 2), optim, ranks=2)[0]
    assert got_losses == pytest.approx(losses, rel=1e-10)
    after = arrays(named)
    error, name = worst({name: weights[name] for name in weights if ".lora." in name}, {n: after[n] for n in after if ".lora." in n})
    assert error <= 1e-10, f"{name} is off by {error:.1e}"
    packed = [name for name in first if name.endswith(".packed")]
    assert packed and all((weights[name] == first[name]).all() for name in packed)


def test_in_bfloat16_bytes_are_gathered_as_bytes(pool):
    first, model, _ = packed_and_plain("llama", "float32", ALL)
    plain = reference_loss(model, *make_documents(LENGTHS)).item()
    case = {"family": "llama", "dtype": "bfloat16", "adapter": ALL}
    device, host = (
        pool.run(run_updates, case, first, *make_documents(LENGTHS), static(2, 2, 2), optim, ranks=2)[0]
        for optim in ({}, {"state_device": "host", "update": "backward"})
    )
    assert device[0] == host[0] and device[0][0] == pytest.approx(plain, rel=0.02) and device[0][-1] < device[0][0]
    assert all((device[3][name] == first[name]).all() for name in first if name.endswith(".packed"))
    assert all((device[2][name] == host[2][name]).all() for name in first if ".lora." in name)
