"""LoRA through the executor against peft on a plain Hugging Face model: loss, every trained parameter's gradient, whole updates.

Float64 rows agree to 1e-10. Frozen weights have no gradient and do not change.
"""

from __future__ import annotations

import pytest
import torch

from efflaunch.parallel.pipeline.config import PipelineOrder
from efflaunch.tests.parity.optimizers_side import RATES, run_updates
from efflaunch.tests.parity.peft_reference import Truth, arrays, check_row, lifted, lora, lora_truth
from efflaunch.tests.parity.reference import reference_loss
from efflaunch.tests.parity.test_parity import ADAPTIVE, LENGTHS, batch, make_documents, plan_of, static, worst
from efflaunch.tests.ranks import RankPool

ALL = lora()
DORA = lora(dora=True)
TRUTH = Truth(lora_truth)
ROWS = {
    "attention, one rank, packed": ("llama", lora(targets=["attention"]), "keep", {}, lambda: [static(1, 1, 1)]),
    "mlp, one rank, chunks of one": ("llama", lora(targets=["mlp"]), "chunks_1", {}, lambda: [static(1, 1, 1)]),
    "two names, rslora, norms": (
        "llama", lora(targets=["v_proj", "down_proj"], rslora=True, modules_to_save=["norms"]), "chunks_5", {}, lambda: [static(1, 1, 1)],
    ),
    "embedding and head": (
        "llama", lora(modules_to_save=["embedding", "head"]), "shares_streamed", {}, lambda: [static(2, 2, 2), static(2, 1, 1)],
    ),
    "tied embeddings": ("llama_mha_tied", ALL, "recompute", {}, lambda: [static(2, 2, 2)]),
    "norms of heads": ("qwen3", ALL, "upipe", {}, lambda: [static(2, 2, 2), static(2, 2, 1)]),
    "biases, windows": ("qwen2", ALL, "streambp", {}, lambda: [static(2, 2, 2)]),
    "norms behind products": ("gemma2", ALL, "chunks_16", {}, lambda: [static(1, 1, 1)]),
    "norms of all heads": ("olmo2", ALL, "upipe", {}, lambda: [static(2, 2, 2)]),
    "beside fused matrices": ("phi3", lora(targets=["o_proj", "down_proj"]), "recompute", {}, lambda: [static(1, 1, 1)]),
    "fused matrices, ulysses 2 and ring 2": ("phi3", ALL, "upipe", {}, lambda: [static(2, 2, 2), static(2, 2, 1)]),
    "fused matrices, kept": ("phi3", lora(targets=["qkv_proj"], rslora=True), "keep", {}, lambda: [static(2, 2, 2)]),
    "fused gate and up": ("glm4", ALL, "streambp", {}, lambda: [static(2, 2, 2)]),
    "attention beside experts": ("mixtral", lora(targets=["attention"]), "recompute", {}, lambda: [static(1, 1, 1), static(1, 1, 1)]),
    "attention beside experts with sinks": ("gpt_oss", lora(targets=["attention"]), "keep", {}, lambda: [static(1, 1, 1)]),
    **{
        f"{policy}, ulysses 2 and ring 2": ("llama_deep", ALL, policy, {}, lambda: [static(2, 2, 2), static(2, 2, 1)])
        for policy in ("keep", "recompute", "keep_attention", "alst", "streambp", "memo_0.3", "upipe_stored", "segments_2",
                       "everything kept by class")
    },
    **{
        f"{policy}, mixed groups, accumulation": ("llama_deep", ALL, policy, {}, lambda: [plan_of(4, *ADAPTIVE)])
        for policy in ("keep", "shares_streamed", "segments_3_host")
    },
    "barrier-free": ("llama", ALL, "recompute", {"barrier_free": True, "replicate": 2}, lambda: [plan_of(4, *ADAPTIVE)]),
    "accumulation, reduced each time": (
        "llama", ALL, "alst", {"reduce_each": True}, lambda: [plan_of(2, *(batch((0, 2, 2, (i,))) for i in range(len(LENGTHS))))],
    ),
    **{
        f"magnitudes, {policy}, ulysses 2 and ring 2": ("llama_deep", DORA, policy, {}, lambda: [static(2, 2, 2), static(2, 2, 1)])
        for policy in ("keep", "recompute", "shares_streamed", "upipe_stored")
    },
    "magnitudes, mixed groups, accumulation": ("llama", DORA, "memo_0.3", {}, lambda: [plan_of(4, *ADAPTIVE)]),
    "magnitudes, fused matrices": ("phi3", lora(dora=True), "streambp", {}, lambda: [static(1, 1, 1)]),
    "magnitudes, biases": ("qwen2", lora(dora=True, rslora=True, modules_to_save=["norms"]), "chunks_5", {}, lambda: [static(2, 2, 1)]),
    "magnitudes, norms of heads": ("qwen3", DORA, "upipe", {}, lambda: [static(1, 1, 1)]),
    "magnitudes, 2 stages": ("llama_deep", DORA, "recompute", {"stages": 2}, lambda: [static(2, 2, 1)]),
    "magnitudes, compiled": ("llama", DORA, "chunks_16", {"compile": "aot_eager"}, lambda: [static(1, 1, 1)]),
    "compiled": ("llama", ALL, "chunks_16", {"compile": "aot_eager"}, lambda: [static(1, 1, 1)]),
    "compiled, kept": ("llama", ALL, "keep", {"compile": "aot_eager"}, lambda: [static(1, 1, 1)]),
    **{
        f"2 stages, {policy}": (
            "llama_deep", ALL, policy, {"stages": 2}, lambda: [plan_of(1, *(batch((0, 1, 1, (i,))) for i in range(len(LENGTHS))))],
        )
        for policy in ("keep", "recompute", "streambp")
    },
    "2 stages of 2, embedding and head": (
        "llama", lora(modules_to_save=["embedding", "head"]), "recompute", {"stages": 2}, lambda: [static(2, 2, 2), static(2, 1, 1)],
    ),
    "2 stages, tied embeddings": ("llama_mha_tied", ALL, "recompute", {"stages": 2}, lambda: [static(2, 2, 2)]),
    "2 stages, interleaved": (
        "llama_deep", ALL, "keep", {"stages": 2, "virtual": 2, "order": PipelineOrder.INTERLEAVED}, lambda: [static(2, 2, 1)],
    ),
}  # fmt: skip
LONG = (
    "magnitudes, compiled", "magnitudes, upipe_stored, ulysses 2 and ring 2", "magnitudes, shares_streamed, ulysses 2 and ring 2",
    "magnitudes, norms of heads", "magnitudes, 2 stages",
)  # fmt: skip


@pytest.fixture(scope="module")
def pool():
    with RankPool() as pool:
        yield pool


@pytest.mark.parametrize("row", [pytest.param(row, marks=pytest.mark.slow if row in LONG else ()) for row in ROWS])
def test_gradients_equal_peft(pool, row):
    check_row(pool, TRUTH, ROWS[row])


UPDATES = {
    "device, step": ({}, {}),
    "device, backward": ({}, {"update": "backward"}),
    "host, step, clipped, magnitudes": ({}, {"state_device": "host", "grad_clip": 0.5}),
    "2 stages, host, backward": ({"stages": 2}, {"state_device": "host", "update": "backward", "grad_clip": 0.5, "clip_mode": "two_pass"}),
    "host, backward": ({"replicate": 2}, {"state_device": "host", "update": "backward"}),
}


@pytest.mark.parametrize("mode", UPDATES)
def test_three_steps_equal_plain_adamw_with_a_rate_of_its_own_for_b(pool, mode):
    """LoRA+ (b_lr_ratio) wherever states live; frozen weights are bit-equal afterwards."""
    more, optim = UPDATES[mode]
    config = lora(b_lr_ratio=4.0, modules_to_save=["norms"], dora="magnitudes" in mode)
    first, losses, trained = _updated(config, optim.get("grad_clip"))
    case = {"family": "llama", "dtype": "float64", "adapter": config, **more}
    world = 4 if more else 2
    got_losses, _, weights, model, states = pool.run(
        run_updates, case, first, *make_documents(LENGTHS), static(world // more.get("stages", 1), 2, 2), optim, ranks=world
    )[0]
    assert got_losses == pytest.approx(losses, rel=1e-10)
    error, name = worst(weights, trained)
    assert error <= 1e-10, f"{name} is off by {error:.1e}"
    assert all((model[name] == first[name]).all() for name in first if ".lora." not in name and not name.endswith("norm.weight"))
    assert {key.rpartition(".")[0] for key in states} == {name for name in first if ".lora." in name or name.endswith("norm.weight")}


def _updated(config, clip):
    model, named = lifted("llama", "float64", config)
    first, losses = arrays(named), []
    groups = [
        {"params": [p for n, p in named.items() if p.requires_grad and _kind(n) == kind], "weight_decay": decay, "ratio": ratio}
        for kind, decay, ratio in (("a", 0.3, 1.0), ("b", 0.3, config.b_lr_ratio), ("norm", 0.0, 1.0))
    ]
    optimizer = torch.optim.AdamW(groups, lr=RATES[0], betas=(0.9, 0.95), eps=1e-8, foreach=False)
    for rate in RATES:
        optimizer.zero_grad()
        loss = reference_loss(model, *make_documents(LENGTHS))
        loss.backward()
        losses.append(loss.item())
        if clip is not None:
            torch.nn.utils.clip_grad_norm_([p for p in named.values() if p.requires_grad], clip)
        for group in optimizer.param_groups:
            group["lr"] = rate * group["ratio"]
        optimizer.step()
    return first, losses, arrays(named)


def _kind(name):
    return "b" if name.endswith(".lora.B") else "a" if name.endswith(".lora.A") else "norm"


def test_in_bfloat16_states_on_the_host_and_in_backward_are_bit_equal_to_those_on_the_device(pool):
    config = lora(modules_to_save=["head"])
    weights = {name: array.astype("float32") for name, array in arrays(lifted("llama", "float32", config)[1]).items()}
    case = {"family": "llama", "dtype": "bfloat16", "adapter": config}
    found = [
        pool.run(run_updates, case, weights, *make_documents(LENGTHS), static(2, 2, 2), optim, ranks=2)[0]
        for optim in ({}, {"update": "backward"}, {"state_device": "host"}, {"state_device": "host", "update": "backward"})
    ]
    (losses, norms, trained, _, states), *others = found
    assert losses[-1] < losses[0] and any((trained[name] != weights[name]).any() for name in trained)
    for got in others:
        assert got[0] == losses and got[1] == norms
        assert all((got[2][name] == trained[name]).all() for name in trained)
        assert got[4].keys() == states.keys() and all((got[4][key] == states[key]).all() for key in states)


def test_in_bfloat16_frozen_weights_are_stored_in_it_and_factors_in_float32(pool):
    config = lora(modules_to_save=["head"])
    for states in ("device", "host"):
        kinds = pool.run(stored_kinds, config, states, ranks=2)[0]
        assert {kind for name, kind in kinds.items() if ".lora." not in name and not name.startswith("lm_head")} == {"torch.bfloat16"}
        wide = "torch.float32" if states == "device" else "torch.bfloat16"
        assert {kind for name, kind in kinds.items() if ".lora." in name or name.startswith("lm_head")} == {wide}


def stored_kinds(config, states):
    """The precision of each parameter on the device."""
    from efflaunch.memory.policy import MemoryPolicy
    from efflaunch.model.build import build_empty
    from efflaunch.parallel.topology import build_topology
    from efflaunch.tests.parity.reference import hf_config

    model = build_empty(
        hf_config("llama"), MemoryPolicy(), build_topology(replicate=1, device="cpu").mesh, device=torch.device("cpu"),
        compute_dtype=torch.bfloat16, loss_chunk_tokens=7, host_weights=states == "host", adapter=config,
    )  # fmt: skip
    return {name: str(p.dtype) for name, p in model.named_parameters()}
