"""The adapter of SmolLM3: layers that do not rotate read the table that turns nothing."""

from __future__ import annotations

import torch

from efflaunch.model.families import layer_adapter
from efflaunch.model.families.rope import UNROTATED, rotary_tables
from efflaunch.tests.parity.reference import reference_model


@torch.no_grad()
def test_queries_and_keys_of_some_layers_are_not_turned() -> None:
    model = reference_model("smollm3", torch.float32)
    adapters = [layer_adapter(layer, "smollm3") for layer in model.model.layers]
    assert [adapter.rope_key for adapter in adapters] == [None, UNROTATED, None]
    x, positions = torch.randn(5, 64), torch.arange(5)
    tables = rotary_tables(model.model.rotary_emb, x, positions, torch.full((5,), 5))
    for adapter in adapters:
        q, k, v = adapter.before_attention(x, tables[adapter.rope_key])
        h = adapter.input_norm(x)
        projected = [adapter.layer.get_submodule(f"self_attn.{name}_proj")(h).view(5, -1, 8) for name in "qkv"]
        assert torch.equal(v, projected[2])
        assert (torch.equal(q, projected[0]) and torch.equal(k, projected[1])) == (adapter.rope_key is UNROTATED)
