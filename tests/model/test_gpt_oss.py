"""gpt-oss's layer beside Hugging Face's: softmax over the chosen logits, biases, gate and up in turns, clamped."""

from __future__ import annotations

import pytest
import torch

from efflaunch.tests.model.mixtures import assert_experts_alike, assert_routes_alike, half_of


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_routing_is_hugging_faces(dtype: torch.dtype) -> None:
    assert_routes_alike("gpt_oss", dtype)


@pytest.mark.parametrize("scale", [1.0, 20.0], ids=["small", "beyond the clamps"])
def test_experts_are_hugging_faces(scale: float) -> None:
    assert_experts_alike("gpt_oss", scale)


def test_the_activation_is_hugging_faces_and_clamps() -> None:
    half, layer = half_of("gpt_oss", swiglu_limit=2.0)
    gate_up = 4 * torch.randn(30, 96)
    ours = half.activate(gate_up)
    torch.testing.assert_close(ours, layer.mlp.experts._apply_gate(gate_up), rtol=1e-6, atol=1e-6)
    clamped = gate_up.clone()
    clamped[:, ::2].clamp_(max=2.0)
    clamped[:, 1::2].clamp_(-2.0, 2.0)
    assert not torch.equal(clamped, gate_up) and torch.equal(half.activate(clamped), ours)
