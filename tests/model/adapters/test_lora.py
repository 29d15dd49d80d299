"""The product through adapters against the same function by plain autograd, with values and without."""

from __future__ import annotations

import torch
from torch import nn

from efflaunch.model.adapters.config import AdapterConfig, AdapterMethod
from efflaunch.model.adapters.lora import Factors, LoraFactors, LoraProduct, insert_adapters, product

CONFIG = AdapterConfig(name="lora", method=AdapterMethod.LORA, rank=3, alpha=6.0, targets=["q_proj"])


def operands():
    generator = torch.Generator().manual_seed(0)
    shapes = {"x": (5, 7), "w": (4, 7), "bias": (4,), "a": (3, 7), "b": (4, 3)}
    return {name: torch.randn(shape, dtype=torch.float64, generator=generator).requires_grad_() for name, shape in shapes.items()}


def test_gradients_are_autograds_whether_values_are_made_or_not() -> None:
    for values in (True, False):
        mine, plain = operands(), operands()
        out = LoraProduct.apply(mine["x"], mine["w"], mine["bias"], mine["a"], mine["b"], 2.0, values)
        want = plain["x"] @ plain["w"].T + plain["bias"] + 2.0 * (plain["x"] @ plain["a"].T) @ plain["b"].T
        dy = torch.arange(20, dtype=torch.float64).view(5, 4)
        got, expected = (torch.autograd.grad(y, list(of.values()), dy) for y, of in ((out, mine), (want, plain)))
        assert all(torch.allclose(one, other, rtol=1e-12) for one, other in zip(got, expected, strict=True))
        if values:
            torch.testing.assert_close(out, want)
        else:
            assert out.untyped_storage().nbytes() == 8, "no memory for values that nobody reads"


def test_frozen_operands_have_no_gradient() -> None:
    mine = operands()
    for name in ("w", "bias"):
        mine[name].requires_grad_(False)
    out = LoraProduct.apply(mine["x"], mine["w"], None, mine["a"], mine["b"], 2.0, True)
    out.sum().backward()
    assert mine["w"].grad is None and mine["a"].grad is not None
    torch.testing.assert_close(out, product(mine["x"], mine["w"], None, Factors(mine["a"], mine["b"], 2.0)))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.model = nn.Module()
        layer = nn.Module()
        layer.self_attn = nn.Module()
        layer.self_attn.q_proj = nn.Linear(8, 6)
        self.model.layers = nn.ModuleList([layer])


def test_the_model_starts_as_it_was() -> None:
    model = Model()
    insert_adapters(model, CONFIG, torch.bfloat16)
    linear = model.model.layers[0].self_attn.q_proj
    assert type(linear) is nn.Linear and isinstance(linear.lora, LoraFactors)
    linear.lora.initialise()
    factors = linear.lora.factors()
    assert factors.scaling == 2.0 and not factors.b.any() and float(factors.a.abs().max()) <= 8**-0.5
    assert [p.dtype for p in linear.parameters()] == [torch.bfloat16, torch.bfloat16, torch.float32, torch.float32]
    assert [p.requires_grad for p in linear.parameters()] == [False, False, True, True]
