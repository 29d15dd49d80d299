"""dots.llm1's layers beside Hugging Face's: routing bit for bit, experts, the shared one, and dense layers before them."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from efflaunch.memory.executor.token_local import NothingSaved
from efflaunch.model.families import layer_adapter
from efflaunch.model.families.dots1 import DENSE, Dots1Layer
from efflaunch.tests.model.mixtures import TOKENS, assert_experts_alike, assert_routes_alike, half_of, hf_model
from efflaunch.tests.model.small import SIZES

KINDS: dict[str, dict[str, Any]] = {
    "groups": {},
    "one group": {"n_group": 1, "topk_group": 1},
    "not renormalised": {"norm_topk_prob": False, "routed_scaling_factor": 1.0},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_routing_is_hugging_faces(kind: str, dtype: torch.dtype) -> None:
    assert_routes_alike("dots1", dtype, **KINDS[kind])


def test_experts_are_hugging_faces() -> None:
    assert_experts_alike("dots1")


@torch.no_grad()
def test_the_whole_half_has_the_shared_expert() -> None:
    half, layer = half_of("dots1")
    rows = torch.randn(TOKENS, SIZES["hidden_size"])
    theirs = rows + layer.mlp(layer.post_attention_layernorm(rows)[None])[0]
    torch.testing.assert_close(half.feed_forward(half).forward(rows, NothingSaved()), theirs, rtol=1e-5, atol=1e-5)


def test_the_first_layers_are_dense() -> None:
    kinds = [type(layer_adapter(layer, "dots1")) for layer in hf_model("dots1", num_hidden_layers=3).model.layers]
    assert kinds == [DENSE, Dots1Layer, Dots1Layer]
