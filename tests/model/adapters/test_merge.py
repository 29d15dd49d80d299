"""Merging: sums are made wide and rounded once; the frozen model is made anew and refused where it is another."""

from __future__ import annotations

from dataclasses import asdict, replace

import pytest
import torch

from efflaunch.errors import CheckpointError
from efflaunch.launcher.config.compose import compose
from efflaunch.model.adapters.base import adapter_identity, model_digest
from efflaunch.model.adapters.merge import SavedAdapter, frozen_weights, merge
from efflaunch.training.session import plain_config


def test_products_are_added_in_float32_and_rounded_once() -> None:
    torch.manual_seed(0)
    weight, a, b = torch.randn(6, 8, dtype=torch.bfloat16), torch.randn(2, 8), torch.randn(6, 2)
    norm, weights = torch.ones(8), {"q.weight": weight.clone(), "norm.weight": torch.zeros(8)}
    merge(weights, {"q.lora.A": a, "q.lora.B": b, "norm.weight": norm}, 0.5)
    assert torch.equal(weights["q.weight"], (weight.float() + 0.5 * b @ a).to(torch.bfloat16))
    assert torch.equal(weights["norm.weight"], norm)


def saved(*overrides):
    config = compose(["+experiment=quickstart", "adapter=lora", "model.num_layers=1", "model.vocab_size=64", *overrides])
    digest = model_digest(config.model, config.train.seed, config.train.dtype)
    metadata = {"config": plain_config(config), "seed": config.train.seed, "adapter": adapter_identity(config.adapter, digest)}
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
