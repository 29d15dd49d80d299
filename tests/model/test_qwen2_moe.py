"""Qwen2-MoE's layer beside Hugging Face's: routing bit for bit, experts, and the expert that all tokens visit."""

from __future__ import annotations

import pytest
import torch

from efflaunch.memory.executor.token_local import NothingSaved
from efflaunch.tests.model.mixtures import TOKENS, assert_experts_alike, assert_routes_alike, half_of
from efflaunch.tests.model.small import SIZES


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("norm", [True, False])
def test_routing_is_hugging_faces(norm: bool, dtype: torch.dtype) -> None:
    assert_routes_alike("qwen2_moe", dtype, norm_topk_prob=norm)


def test_experts_are_hugging_faces() -> None:
    assert_experts_alike("qwen2_moe")


@torch.no_grad()
def test_the_whole_half_has_the_shared_expert() -> None:
    half, layer = half_of("qwen2_moe")
    rows = torch.randn(TOKENS, SIZES["hidden_size"])
    theirs = rows + layer.mlp(layer.post_attention_layernorm(rows)[None])[0]
    torch.testing.assert_close(half.feed_forward(half).forward(rows, NothingSaved()), theirs, rtol=1e-5, atol=1e-5)
