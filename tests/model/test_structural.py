"""The adapter that reads modules: equal to the adapters of their own that families have, and to Hugging Face's own layers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import efflaunch.model.build as build
from efflaunch.memory.heads import Heads
from efflaunch.model.config import ModelConfig
from efflaunch.model.families import layer_adapter
from efflaunch.model.families.rope import UNROTATED, rotary_tables
from efflaunch.model.families.structural import StructuralLayer
from efflaunch.model.proof.compare import compare
from efflaunch.model.proof.tiny_config import tiny_config
from efflaunch.tests.model.public_configs import SUPPORTED, write_config
from efflaunch.tests.parity.reference import STRUCTURAL, reference_model


@pytest.mark.parametrize("name", ["Llama-3.2-1B", "Qwen3-0.6B", "gemma-2-27b", "gemma-3-1b", "SmolLM3-3B"])
def test_families_with_adapters_of_their_own_are_cases_of_it(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = ModelConfig(name="m", path=str(write_config(tmp_path, SUPPORTED[name])))
    monkeypatch.setattr(build, "layer_adapter", lambda layer, model_type: StructuralLayer(layer))
    assert compare(tiny_config(config)).is_exact


@torch.no_grad()
@pytest.mark.parametrize("family", STRUCTURAL)
def test_heads_that_are_asked_for_are_those_of_all(family: str) -> None:
    model = reference_model(family, torch.float32)
    adapter = layer_adapter(model.model.layers[0], model.config.model_type)
    assert type(adapter) is StructuralLayer
    x, positions = torch.randn(5, 64), torch.arange(5)
    rope = rotary_tables(model.model.rotary_emb, x, positions, torch.full((5,), 5))[adapter.rope_key]
    q, k, v = adapter.before_attention(x, rope)
    size = adapter.spec.head_dim
    assert q.shape == (5, 8, size) and k.shape == v.shape == (5, 2, size)
    for queries in ((0, 1, 2, 3), (5,), (1, 6)):
        some, key, value = adapter.before_attention(x, rope, Heads(queries, (1,)))
        torch.testing.assert_close(some, q[:, list(queries)])
        torch.testing.assert_close(key, k[:, 1:])
        torch.testing.assert_close(value, v[:, 1:])


@torch.no_grad()
def test_part_of_a_head_turns_and_some_layers_do_not() -> None:
    model = reference_model("phi3", torch.float32)
    adapter = layer_adapter(model.model.layers[0], "phi3")
    heads, (cos, sin) = torch.randn(5, 2, 8), (torch.rand(5, 1, 4), torch.rand(5, 1, 4))
    moved = adapter.rotate(heads, cos, sin)
    assert torch.equal(moved[..., 4:], heads[..., 4:]) and not torch.equal(moved[..., :4], heads[..., :4])
    cohere = reference_model("cohere2", torch.float32)
    assert [layer_adapter(layer, "cohere2").rope_key for layer in cohere.model.layers] == [None, UNROTATED, None]
    assert [layer_adapter(layer, "cohere2").spec.window for layer in cohere.model.layers] == [7, None, 7]
