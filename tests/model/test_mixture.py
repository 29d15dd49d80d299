"""The half of a layer that is a mixture: which modules are refused, because what they add would be missing from gradients."""

from __future__ import annotations

from types import MethodType
from typing import Any

import pytest
import torch
from torch import nn

from efflaunch.model.families import layer_adapter
from efflaunch.model.families.mixture import MixtureHalf, SharedMixtureHalf
from efflaunch.tests.model.mixtures import half_of, hf_model, refuses

ROUTERS = {"qwen2_moe": "mlp.gate", "qwen3_moe": "mlp.gate", "mixtral": "mlp.gate", "gpt_oss": "mlp.router"}


@pytest.mark.parametrize("family", ROUTERS)
def test_another_class_is_refused(family: str) -> None:
    for name in (ROUTERS[family], "mlp.experts"):
        layer = hf_model(family).model.layers[0]
        module = layer.get_submodule(name)
        module.__class__ = type(f"Other{type(module).__name__}", (type(module),), {})
        assert f"a Other{type(module).__mro__[1].__name__}, not transformers' " in str(refuses(layer, family))


def test_a_class_of_the_same_name_from_elsewhere_is_refused() -> None:
    layer = hf_model("mixtral").model.layers[0]
    layer.mlp.experts.__class__ = type("MixtralExperts", (type(layer.mlp.experts),), {"__module__": "elsewhere"})
    assert "a MixtralExperts, not transformers' MixtralExperts at mlp.experts" in str(refuses(layer, "mixtral"))


def hooked(module: nn.Module) -> None:
    module.register_forward_hook(lambda module, inputs, output: output)


def replaced(module: Any) -> None:
    module.forward = MethodType(lambda self, x: x, module)


@pytest.mark.parametrize(("change", "message"), [(hooked, "with hooks"), (replaced, "with a forward of its own")])
@pytest.mark.parametrize("name", ["mlp.gate", "mlp.experts", "mlp.shared_expert.up_proj", "mlp.shared_expert_gate"])
def test_modules_that_would_not_be_called_are_refused(name: str, change: Any, message: str) -> None:
    layer = hf_model("qwen2_moe").model.layers[0]
    change(layer.get_submodule(name))
    refused = str(refuses(layer, "qwen2_moe"))
    assert message in refused and f" at {name} of" in refused


def test_weights_that_no_step_reads_are_refused() -> None:
    layer = hf_model("qwen3_moe").model.layers[0]
    layer.mlp.gate.register_parameter("bias", nn.Parameter(torch.zeros(8)))
    layer.mlp.register_parameter("scale", nn.Parameter(torch.ones(1)))
    assert "a parameter that no step of a layer reads at mlp.scale" in str(refuses(layer, "qwen3_moe"))


def test_a_dense_layer_is_no_mixture() -> None:
    assert "no such module at mlp.gate of" in str(refuses(hf_model("llama").model.layers[0], "mixtral"))


def test_layers_without_experts_are_those_of_the_dense_family() -> None:
    layers = hf_model("qwen3_moe", num_hidden_layers=3, mlp_only_layers=[1]).model.layers
    assert [type(layer_adapter(layer, "qwen3_moe")).__name__ for layer in layers] == ["Qwen3MoeLayer", "HeadNormLayer", "Qwen3MoeLayer"]
    layers = hf_model("qwen2_moe", num_hidden_layers=3, decoder_sparse_step=2).model.layers
    assert [type(layer_adapter(layer, "qwen2_moe")).__name__ for layer in layers] == ["LlamaLayer", "Qwen2MoeLayer", "LlamaLayer"]


def test_the_router_says_how_many_and_whether_shares_add_up_to_one() -> None:
    for norm in (True, False):
        half, _ = half_of("qwen3_moe", norm_topk_prob=norm)
        assert (half.num_experts, half.per_token, half.renormalise) == (8, 2, norm) and type(half).has_shared is False
    assert isinstance(half_of("qwen2_moe")[0], SharedMixtureHalf)


def test_a_weights_gradient_goes_to_the_router_as_autograd_has_it() -> None:
    half: MixtureHalf = half_of("qwen3_moe", torch.float64, norm_topk_prob=True)[0]
    logits = torch.randn(3, 8, dtype=torch.float64, requires_grad=True)
    chosen = half.choose(logits)
    assert torch.autograd.gradcheck(lambda each: half.weigh(each, chosen), (logits,))
    assert torch.allclose(half.weigh(logits, chosen).sum(1), torch.ones(3, dtype=torch.float64))
