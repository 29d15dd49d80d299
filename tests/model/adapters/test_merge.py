"""Merging: sums are made wide and rounded once; the frozen model is made anew and refused where it is another."""

from __future__ import annotations

from dataclasses import asdict, replace

import pytest
import torch

from efflaunch.errors import CheckpointError
from efflaunch.launcher.config.compose import compose
from efflaunch.model.adapters.base import adapter_identity, model_digest
from efflaunch.model.adapters.merge import SavedAdapter, frozen_weights, merge
from efflaunch.model.adapters.nf4 import byte_levels, pack, unpack
from efflaunch.model.spec import model_spec
from efflaunch.training.session import plain_config


def test_products_are_added_in_float32_and_rounded_once() -> None:
    torch.manual_seed(0)
    weight, a, b = torch.randn(6, 8, dtype=torch.bfloat16), torch.randn(2, 8), torch.randn(6, 2)
    norm, weights = torch.ones(8), {"q.weight": weight.clone(), "norm.weight": torch.zeros(8)}
    merge(weights, {"q.lora.A": a, "q.lora.B": b, "norm.weight": norm}, 0.5)
    assert torch.equal(weights["q.weight"], (weight.float() + 0.5 * b @ a).to(torch.bfloat16))
    assert torch.equal(weights["norm.weight"], norm)


def test_the_error_of_rounding_is_that_of_the_worst_matrix() -> None:
    torch.manual_seed(0)
    weight, a, b = torch.randn(6, 8), torch.randn(2, 8), torch.randn(6, 2)
    update = 0.5 * b @ a
    trained = {"q.lora.A": a, "q.lora.B": b, "k.lora.A": a, "k.lora.B": 1e-3 * b}
    weights = {"q.weight": weight.clone(), "k.weight": weight.clone()}
    rounding = merge(weights, trained, 0.5, torch.bfloat16)
    exact = weight + 1e-3 * update
    error = (exact - exact.to(torch.bfloat16).float()).norm()
    assert rounding is not None and rounding.name == "k.weight" and weights["k.weight"].dtype == torch.bfloat16
    assert rounding.of_matrix == pytest.approx((error / exact.norm()).item(), rel=1e-5)
    assert rounding.of_update == pytest.approx((error / (1e-3 * update).norm()).item(), rel=1e-4)
    assert str(rounding).endswith("of the matrix, in k.weight")
    assert merge({"q.weight": weight.clone()}, {"q.lora.A": a, "q.lora.B": b}, 0.5) is None


def saved(*overrides):
    config = compose(["+experiment=quickstart", "adapter=lora", "model.num_layers=1", "model.vocab_size=64", *overrides])
    digest = model_digest(config.model, config.train.seed, config.train.dtype)
    identity = adapter_identity(config.adapter, digest, model_spec(config.model))
    metadata = {"config": plain_config(config), "seed": config.train.seed, "adapter": identity}
    return SavedAdapter.of(metadata), config


def test_the_frozen_model_is_made_anew() -> None:
    about, config = saved("train.seed=3")
    assert about is not None
    assert (about.adapter, asdict(about.model)) == (config.adapter, asdict(config.model))
    weights = frozen_weights(about, config.train.dtype)
    again = frozen_weights(about, config.train.dtype)
    assert all(torch.equal(weights[name], again[name]) for name in weights)
    assert weights["model.layers.0.self_attn.q_proj.weight"].std() > 0
    with pytest.raises(CheckpointError, match="other weights than those the adapters were trained beside"):
        frozen_weights(replace(about, seed=4), config.train.dtype)
    assert SavedAdapter.of({}) is None


def test_matrices_that_were_packed_are_what_was_computed_with() -> None:
    plain, config = saved("train.seed=3", "train.dtype=bfloat16")
    packed, _ = saved("train.seed=3", "train.dtype=bfloat16", "adapter=qlora", "adapter.quantized=[mlp]")
    assert plain is not None and packed is not None and plain.digest == packed.digest
    before, after = (frozen_weights(about, config.train.dtype) for about in (plain, packed))
    for name, matrix in before.items():
        is_packed = ".mlp." in name
        want = unpack(pack(matrix), matrix.shape[1], torch.bfloat16, byte_levels()) if is_packed else matrix
        assert torch.equal(after[name], want) and (is_packed != torch.equal(matrix, want))
