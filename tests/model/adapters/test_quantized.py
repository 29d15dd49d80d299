"""Packed matrices as modules: the product and its gradients, what autograd keeps, names and shapes, first weights, weights of files."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from efflaunch.errors import ConfigError
from efflaunch.model.adapters.config import AdapterConfig, AdapterMethod
from efflaunch.model.adapters.lora import Factors, insert_adapters
from efflaunch.model.adapters.names import ATTENTION
from efflaunch.model.adapters.nf4 import pack
from efflaunch.model.adapters.quantized import QuantizedLinear, fill_levels, insert_quantized, packed_product, plain_shapes
from efflaunch.model.build import initialise
from efflaunch.model.config import ModelConfig
from efflaunch.model.families.projection import projection_of
from efflaunch.model.weights import load_weights
from efflaunch.tests.parity.reference import hf_config, reference_model


def quantized_linear(bias: bool = False) -> tuple[QuantizedLinear, torch.Tensor]:
    """A module of 6 x 80 in float64, and its matrix as it is read."""
    torch.manual_seed(0)
    linear = nn.Linear(80, 6, bias, dtype=torch.float64).requires_grad_(False)
    module = QuantizedLinear(linear, torch.float64)
    fill_levels(module)
    module.fill_from(linear, dict(module.named_parameters()))
    return module, module.matrix().wide()


@pytest.mark.parametrize("adapted", [False, True])
def test_the_product_and_its_gradients_are_those_of_the_wide_matrix(adapted: bool) -> None:
    module, wide = quantized_linear(bias=True)
    x, a, b = (torch.randn(*size, dtype=torch.float64, requires_grad=True) for size in ((5, 80), (2, 80), (6, 2)))
    factors, leaves = (Factors(a, b, 0.5), [x, a, b]) if adapted else (None, [x])
    bias = module.get_parameter("bias")
    got = packed_product(x, module.matrix(), bias, factors, values=True)
    want = x @ wide.T + bias + (0.5 * x @ a.T @ b.T if adapted else 0.0)
    torch.testing.assert_close(got, want)
    dy = torch.randn_like(got)
    kept = [saved.shape for saved in got.grad_fn.saved_tensors if saved is not None and saved.is_floating_point()]
    assert len(kept) == len(leaves) + 1 and wide.shape not in kept, "bytes are kept"
    unmade = packed_product(x, module.matrix(), bias, factors, values=False)
    gradients = torch.autograd.grad(want, leaves, dy)
    for made in (got, unmade):
        for mine, theirs in zip(torch.autograd.grad(made, leaves, dy), gradients, strict=True):
            torch.testing.assert_close(mine, theirs)


def test_rows_are_taken_from_the_bytes() -> None:
    layer = nn.Module()
    layer.q, wide = quantized_linear()
    x = torch.randn(3, 80, dtype=torch.float64)
    projection = projection_of(layer, "q")
    torch.testing.assert_close(projection(x, rows=(slice(2, 4),)), x @ wide[2:4].T)
    torch.testing.assert_close(projection(x, rows=(slice(5, 6), slice(0, 1))), x @ wide[[5, 0]].T)


def quantized_model(family: str = "qwen2"):
    """A model with packed attention and adapters beside it, and one as it was: frozen, in float32, with the same seed."""
    config = AdapterConfig(method=AdapterMethod.QLORA, rank=2, quantized=["attention"])
    model, plain = reference_model(family, torch.float32), reference_model(family, torch.float32)
    insert_adapters(model, config, torch.float32)
    for layer in model.model.layers:
        insert_quantized(layer, ATTENTION, torch.float32)
    fill_levels(model)
    return model, plain


def test_names_and_first_weights_are_those_of_the_model_that_is_not_packed() -> None:
    model, plain = quantized_model()
    shapes = plain_shapes(dict(model.named_parameters()), model)
    assert {name: shape for name, shape in shapes.items() if ".lora." not in name} == {
        name: tuple(p.shape) for name, p in plain.named_parameters()
    }
    initialise(model, 7)
    initialise(plain, 7)
    weights, named = dict(plain.named_parameters()), dict(model.named_parameters())
    for name in ("model.layers.0.self_attn.k_proj", "model.layers.1.self_attn.o_proj"):
        assert torch.equal(named[f"{name}.packed"], pack(weights[f"{name}.weight"])) and not named[f"{name}.packed"].requires_grad
    assert torch.equal(named["model.layers.0.mlp.up_proj.weight"], weights["model.layers.0.mlp.up_proj.weight"])
    assert isinstance(model.model.layers[0].self_attn.q_proj.lora, nn.Module)


def test_weights_of_files_are_packed_and_checked(tmp_path) -> None:
    model, plain = quantized_model()
    plain.save_pretrained(tmp_path / "plain")
    load_weights(model, ModelConfig(name="t", path=str(tmp_path / "plain")), 0, shapes=plain_shapes(dict(model.named_parameters()), model))
    weights, named = dict(plain.named_parameters()), dict(model.named_parameters())
    for name in (f"model.layers.1.{matrix}" for matrix in ATTENTION):
        assert torch.equal(named[f"{name}.packed"], pack(weights[f"{name}.weight"]))
    assert torch.equal(named["model.layers.0.self_attn.q_proj.bias"], weights["model.layers.0.self_attn.q_proj.bias"])
    with torch.no_grad():
        weights["model.layers.0.self_attn.v_proj.weight"][1, 1] = float("nan")
    plain.save_pretrained(tmp_path / "damaged")
    with pytest.raises(ConfigError, match="NaN or infinite numbers in model.layers.0.self_attn.v_proj.weight"):
        load_weights(
            model, ModelConfig(name="t", path=str(tmp_path / "damaged")), 0, shapes=plain_shapes(dict(model.named_parameters()), model)
        )
    assert hf_config("qwen2").num_hidden_layers == 2
