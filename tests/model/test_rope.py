"""Rotary tables have a column for every number of a head, whichever way Hugging Face's module makes them."""

from __future__ import annotations

import pytest
import torch
from transformers.models.gpt_oss.modeling_gpt_oss import _apply_rotary_emb
from transformers.models.llama.modeling_llama import rotate_half

from efflaunch.model.families.rope import UNROTATED, rotary_tables
from efflaunch.tests.parity.reference import reference_model


@pytest.mark.parametrize("family", ["llama", "rope_yarn", "gemma3", "gpt_oss_dense", "smollm3"])
def test_tables_are_as_wide_as_a_head(family: str) -> None:
    model = reference_model(family, torch.float32)
    positions, lengths = torch.tensor([0, 1, 2, 0, 1]), torch.tensor([3, 3, 3, 2, 2])
    head_dim = model.model.layers[0].self_attn.head_dim
    tables = rotary_tables(model.model.rotary_emb, torch.zeros(5, 64), positions, lengths)
    assert len(tables) == (2 if family in ("gemma3", "smollm3") else 1)
    for key, (cos, sin) in tables.items():
        assert key != UNROTATED or bool((cos == 1).all() and (sin == 0).all())
        assert cos.shape == sin.shape == (5, head_dim)
        assert torch.equal(cos[:3][:2], cos[3:]) and torch.equal(cos[:, : head_dim // 2], cos[:, head_dim // 2 :])


def test_gpt_oss_turns_the_halves_of_a_head_as_llama_does() -> None:
    rotary = reference_model("gpt_oss_dense", torch.float32).model.rotary_emb
    assert rotary.attention_scaling > 1.0  # YaRN's factor is in the table
    q, positions = torch.randn(9, 1, 16), torch.arange(9)
    half_cos, half_sin = (table[0].unsqueeze(1) for table in rotary(q, positions.unsqueeze(0)))
    assert half_cos.shape == (9, 1, 8)
    cos, sin = (table.unsqueeze(1) for table in rotary_tables(rotary, q, positions, torch.full((9,), 9))[None])
    assert torch.equal(q * cos + rotate_half(q) * sin, _apply_rotary_emb(q, half_cos, half_sin))
