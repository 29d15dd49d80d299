"""Qwen3-MoE's layer beside Hugging Face's: routing bit for bit with and without renormalised weights, and experts."""

from __future__ import annotations

import pytest
import torch

from efflaunch.tests.model.mixtures import assert_experts_alike, assert_routes_alike


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("norm", [True, False])
def test_routing_is_hugging_faces(norm: bool, dtype: torch.dtype) -> None:
    assert_routes_alike("qwen3_moe", dtype, norm_topk_prob=norm)


def test_experts_are_hugging_faces() -> None:
    assert_experts_alike("qwen3_moe")
