"""Products of a layer read weight and bias: whatever else a module would compute is refused, under every policy."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from efflaunch.errors import ConfigError
from efflaunch.memory.policy import KEEP_ALL, MemoryPolicy
from efflaunch.model.build import install
from efflaunch.model.families import layer_adapter
from efflaunch.model.families.projection import Projection
from efflaunch.tests.memory.test_saved import POLICIES
from efflaunch.tests.parity.reference import reference_model

ALL_POLICIES = {**POLICIES, "keep": KEEP_ALL, "compiled": replace(KEEP_ALL, compile="eager")}


class LowRank(nn.Module):
    """A wrapped projection, as adapters for fine-tuning put in place of one."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base_layer = base
        self.down, self.up = nn.Linear(base.in_features, 2, bias=False), nn.Linear(2, base.out_features, bias=False)

    @property
    def weight(self) -> Tensor:
        return self.base_layer.weight

    @property
    def bias(self) -> Tensor | None:
        return self.base_layer.bias

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x) + self.up(self.down(x))  # type: ignore[no-any-return]


class LowRankLinear(nn.Linear):
    """The same as a subclass: isinstance does not find it."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__(base.in_features, base.out_features, bias=base.bias is not None)
        self.extra = nn.Parameter(torch.zeros(base.in_features, base.out_features))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + x @ self.extra


@pytest.mark.parametrize("wrap", [LowRank, LowRankLinear])
def test_wrapped_projections_are_refused_under_every_policy(wrap: Any) -> None:
    model = reference_model("llama", torch.float32)
    attention = model.model.layers[1].self_attn
    attention.v_proj = wrap(attention.v_proj)
    for policy in ALL_POLICIES.values():
        with pytest.raises(ConfigError, match=rf"(?s)model: found a {wrap.__name__} at self_attn.v_proj.*torch.nn.Linear.*merge them"):
            install(model, policy, loss_chunk_tokens=16)


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "mistral", "gemma2", "gemma3", "smollm3", "olmo2", "cohere2"])
def test_every_product_of_every_family_is_guarded(family: str) -> None:
    layer, config = (model := reference_model(family, torch.float32)).model.layers[0], model.config
    linears = [name for name, module in layer.named_modules() if isinstance(module, nn.Linear)]
    assert set(layer_adapter(layer, config.model_type).projections) == set(linears) and len(linears) == 7
    for name in linears:
        owner, _, attribute = name.rpartition(".")
        original = layer.get_submodule(name)
        setattr(layer.get_submodule(owner), attribute, LowRank(original))
        with pytest.raises(ConfigError, match=f"a LowRank at {name} "):
            layer_adapter(layer, config.model_type)
        setattr(layer.get_submodule(owner), attribute, original)


def _parametrised(module: nn.Linear) -> None:
    parametrize.register_parametrization(module, "weight", nn.Identity())


def _normed(module: nn.Linear) -> None:
    torch.nn.utils.weight_norm(module)


def _hooked(module: nn.Linear) -> None:
    module.register_forward_hook(lambda *_: None)


def _patched(module: nn.Linear) -> None:
    module.forward = module.forward  # type: ignore[method-assign]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_parametrised, "a ParametrizedLinear at"),
        (_normed, "a Linear with hooks at"),
        (_hooked, "a Linear with hooks at"),
        (_patched, "a Linear with a forward of its own at"),
    ],
)
def test_whatever_else_changes_a_product_is_refused(change: Any, message: str) -> None:
    model = reference_model("llama", torch.float32)
    change(model.model.layers[0].mlp.down_proj)
    with pytest.raises(ConfigError, match=message):
        install(model, MemoryPolicy(), loss_chunk_tokens=16)


def test_parameters_that_no_step_reads_are_refused() -> None:
    model = reference_model("llama", torch.float32)
    model.model.layers[0].self_attn.sinks = nn.Parameter(torch.zeros(8))
    with pytest.raises(ConfigError, match=r"a parameter that no step of a layer reads at self_attn\.sinks.*gradient would be lost"):
        install(model, MemoryPolicy(), loss_chunk_tokens=16)
    model = reference_model("llama", torch.float32)
    del model.model.layers[0].mlp.up_proj
    with pytest.raises(ConfigError, match=r"no such module at mlp\.up_proj"):
        install(model, MemoryPolicy(), loss_chunk_tokens=16)


def test_a_projection_wrapped_after_installation_is_refused_when_it_is_used() -> None:
    model = reference_model("llama", torch.float32)
    install(model, MemoryPolicy(), loss_chunk_tokens=16)
    layer = model.model.layers[0]
    layer.mlp.gate_proj = LowRank(layer.mlp.gate_proj)
    with pytest.raises(ConfigError, match=r"a LowRank at mlp\.gate_proj"):
        layer.forward.adapter.mlp_in(torch.zeros(3, 64))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rows", [None, (slice(2, 5),), (slice(6, 7), slice(0, 1), slice(3, 4))], ids=["all", "run", "some"])
def test_gradients_without_values_are_those_of_the_product(rows: Any, bias: bool) -> None:
    module = nn.Linear(5, 7, bias=bias, dtype=torch.float64)
    x, dy = torch.randn(4, 5, dtype=torch.float64, requires_grad=True), torch.randn(4, 7 if rows is None else 3, dtype=torch.float64)
    product = Projection(module.weight, module.bias)
    inputs = [x, *module.parameters()]
    expected = torch.autograd.grad(module(x) if rows is None else torch.cat([module(x)[:, run] for run in rows], 1), inputs, dy)
    for graph in (False, True):
        got = torch.autograd.grad(product(x, graph=graph, rows=rows), inputs, dy)
        for theirs, ours in zip(expected, got, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
