"""Mixtral's layer beside Hugging Face's: routing bit for bit, weights in float32 whatever the logits, and experts."""

from __future__ import annotations

import pytest
import torch

from efflaunch.tests.model.mixtures import assert_experts_alike, assert_routes_alike, half_of


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_routing_is_hugging_faces(dtype: torch.dtype) -> None:
    assert_routes_alike("mixtral", dtype)


def test_weights_stay_in_float32() -> None:
    half, _ = half_of("mixtral", torch.bfloat16)
    logits = torch.randn(3, 4, dtype=torch.bfloat16)
    assert half.weigh(logits, half.choose(logits)).dtype == torch.float32


def test_experts_are_hugging_faces() -> None:
    assert_experts_alike("mixtral")
