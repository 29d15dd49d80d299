"""AdamW over shards against plain AdamW, and the global norm against torch's on one process."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from efflaunch.tests.ranks import RankPool
from efflaunch.tests.training.small import Small, backward, full, plain_model, shard
from efflaunch.training.optimizers.adamw import build_optimizer, clip_gradients, set_learning_rate
from efflaunch.training.optimizers.config import OptimConfig

CONFIG = OptimConfig(name="test", lr=1e-2, weight_decay=0.3)
TOLERANCE = {torch.float32: 2e-6, torch.float64: 1e-13}
LAYOUTS = [
    pytest.param(1, 1, id="world-1"),
    pytest.param(2, 1, id="fsdp-2"),
    pytest.param(4, 1, id="fsdp-4"),
    pytest.param(4, 2, id="hsdp-2x2"),
]


@pytest.fixture(scope="module")
def pool() -> Iterator[RankPool]:
    with RankPool() as pool:
        yield pool


def _train(ranks_dtype: torch.dtype, replicate: int, max_norm: float) -> tuple[list[float], dict[str, Tensor]]:
    """Three clipped updates; the norms and the weights after them."""
    model = shard(plain_model(ranks_dtype), replicate)
    optimizer = build_optimizer(model, CONFIG)
    norms = []
    for step in range(3):
        backward(model, step, scale=3.0)
        norms.append(clip_gradients(model, max_norm))
        set_learning_rate(optimizer, CONFIG.lr * (step + 1))
        optimizer.step()
        optimizer.zero_grad()
    return norms, {name: full(parameter) for name, parameter in model.named_parameters()}


def _reference(dtype: torch.dtype, max_norm: float) -> tuple[list[float], dict[str, Tensor]]:
    model = plain_model(dtype)
    plain = [p for n, p in model.named_parameters() if n == "embed.weight" or p.ndim < 2]
    decayed = [p for n, p in model.named_parameters() if n != "embed.weight" and p.ndim >= 2]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.3}, {"params": plain, "weight_decay": 0.0}], lr=1e-2, betas=(0.9, 0.95), foreach=False
    )
    norms = []
    for step in range(3):
        backward(model, step, scale=3.0)
        norms.append(nn.utils.clip_grad_norm_(model.parameters(), max_norm, foreach=False).item())
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 * (step + 1)
        optimizer.step()
        optimizer.zero_grad()
    return norms, {name: full(parameter) for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize(("ranks", "replicate"), LAYOUTS)
@pytest.mark.parametrize("max_norm", [0.5, 1e6], ids=["clipped", "not-clipped"])
def test_three_updates_equal_plain_adamw_on_one_process(
    pool: RankPool, dtype: torch.dtype, ranks: int, replicate: int, max_norm: float
) -> None:
    norms, weights = _reference(dtype, max_norm)
    assert norms[0] > 0.5
    for rank_norms, rank_weights in pool.run(_train, dtype, replicate, max_norm, ranks=ranks):
        assert rank_norms == pytest.approx(norms, rel=TOLERANCE[dtype])
        for name, expected in weights.items():
            torch.testing.assert_close(rank_weights[name], expected, rtol=10 * TOLERANCE[dtype], atol=10 * TOLERANCE[dtype], msg=name)


def test_without_a_process_group_and_without_clipping() -> None:
    model = plain_model(torch.float64)
    backward(model)
    before = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    expected = math.sqrt(sum(float(g.square().sum()) for g in before.values()))
    assert clip_gradients(model, None) == pytest.approx(expected, rel=1e-14)
    assert all(torch.equal(p.grad, before[name]) for name, p in model.named_parameters() if p.grad is not None)


def _norm_of_ones(replicate: int) -> float:
    model = shard(plain_model(), replicate)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    return clip_gradients(model, 1.0)


@pytest.mark.parametrize(("ranks", "replicate"), LAYOUTS)
def test_each_element_counts_once_whatever_the_mesh(pool: RankPool, ranks: int, replicate: int) -> None:
    count = sum(parameter.numel() for parameter in plain_model().parameters())
    assert pool.run(_norm_of_ones, replicate, ranks=ranks) == [pytest.approx(math.sqrt(count), rel=1e-6)] * ranks


def _with_a_nan_on_the_last_rank() -> tuple[float, list[bool]]:
    model = shard(plain_model())
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    if torch.distributed.get_rank() == torch.distributed.get_world_size() - 1:
        model.embed.weight.grad.to_local().fill_(math.nan)  # type: ignore[union-attr]
    norm = clip_gradients(model, 1.0)
    return norm, [bool((p.grad.to_local() == 1).all()) for p in model.layers.parameters() if p.grad is not None]


def test_a_norm_that_is_not_finite_reaches_every_rank_and_scales_nothing(pool: RankPool) -> None:
    for norm, untouched in pool.run(_with_a_nan_on_the_last_rank, ranks=2):
        assert math.isnan(norm) and all(untouched)


def test_decay_goes_by_kind_and_groups_carry_names() -> None:
    model = Small(tied=False)
    model.layers[0].gate.requires_grad_(False)
    decay, rest = build_optimizer(model, CONFIG).param_groups
    assert (decay["name"], decay["weight_decay"], rest["name"], rest["weight_decay"]) == ("decay", 0.3, "no_decay", 0.0)
    assert decay["param_names"] == [
        "layers.0.up.weight",
        "layers.0.down.weight",
        "layers.1.up.weight",
        "layers.1.down.weight",
        "head.weight",
    ]
    assert set(rest["param_names"]) == {
        *("embed.weight", "norm.weight", "norm.bias", "layers.1.gate"),
        *(f"layers.{i}.{name}" for i in range(2) for name in ("norm.weight", "norm.bias", "up.bias")),
    }


def test_a_tied_head_is_the_embedding_and_not_decayed() -> None:
    decay, rest = build_optimizer(Small(tied=True), CONFIG).param_groups
    assert "embed.weight" in rest["param_names"]
    assert not {"head.weight", "embed.weight"} & set(decay["param_names"])


def test_a_hugging_face_model_decays_its_projections_only() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        num_hidden_layers=1, hidden_size=8, intermediate_size=16, num_attention_heads=2, num_key_value_heads=1, vocab_size=32
    )
    decay, rest = build_optimizer(LlamaForCausalLM(config), CONFIG).param_groups
    assert rest["param_names"] == [
        "model.embed_tokens.weight",
        "model.layers.0.input_layernorm.weight",
        "model.layers.0.post_attention_layernorm.weight",
        "model.norm.weight",
    ]
    assert decay["param_names"][-1] == "lm_head.weight" and len(decay["param_names"]) == 8
    assert all(group["fused"] for group in (decay, rest))
