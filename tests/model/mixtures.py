"""Layers with experts beside Hugging Face's own: what each family's test compares."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from efflaunch.errors import ConfigError
from efflaunch.memory.executor.experts import Routing
from efflaunch.model.config import ModelConfig
from efflaunch.model.families import layer_adapter
from efflaunch.model.families.mixture import MixtureHalf
from efflaunch.model.hf_fields import model_fields
from efflaunch.model.spec import model_spec
from efflaunch.model.weights import persistent_buffers
from efflaunch.tests.model.small import FAMILIES, SIZES, edit_config, of, save_model

TOKENS = 50


def hf_model(family: str, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    """Hugging Face's model, random weights everywhere."""
    torch.manual_seed(5)
    config = AutoConfig.for_model(family, **{**SIZES, **FAMILIES[family], **changes})
    # Its grouped products know no float64; the loop over experts is what they stand for.
    config._experts_implementation = "eager"
    model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="eager")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
        for bias in persistent_buffers(model).values():
            bias.add_(torch.randn_like(bias) * 0.3)
    return model


def half_of(family: str, dtype: torch.dtype = torch.float32, **changes: Any) -> tuple[MixtureHalf, Any]:
    """The adapter of the last layer, and the layer."""
    layer = hf_model(family, dtype, **changes).model.layers[-1]
    adapter = layer_adapter(layer, family)
    assert isinstance(adapter, MixtureHalf)
    return adapter, layer


@torch.no_grad()
def assert_routes_alike(family: str, dtype: torch.dtype, **changes: Any) -> None:
    """The same experts and the very bits of their weights as Hugging Face's router has for random rows."""
    half, layer = half_of(family, dtype, **changes)
    x = torch.randn(TOKENS, SIZES["hidden_size"], dtype=dtype)
    h, logits = half.route(x)
    assert torch.equal(h, layer.post_attention_layernorm(x))
    theirs, weights, chosen = layer.get_submodule(half.router)(h)
    assert torch.equal(logits, theirs)
    ours = half.choose(logits)
    assert torch.equal(ours, chosen) and ours.shape == (TOKENS, half.per_token)
    weighed = half.weigh(logits, ours.to(torch.int32))
    assert weighed.dtype == weights.dtype and torch.equal(weighed, weights)


@torch.no_grad()
def assert_experts_alike(family: str, scale: float = 1.0) -> None:
    """The same sum over chosen experts as Hugging Face's module makes of random rows, of `scale`."""
    half, layer = half_of(family, torch.float64)
    h = scale * torch.randn(TOKENS, SIZES["hidden_size"], dtype=torch.float64)
    _, weights, chosen = layer.get_submodule(half.router)(h)
    routing, experts = Routing.of(chosen, half.num_experts), half.experts()
    ours = experts.output(experts.gate_and_up(routing.at_experts(h), routing), weights, routing)
    theirs = layer.mlp.experts(h, chosen, weights)
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10 * float(theirs.abs().max()))


def refuses(layer: nn.Module, family: str) -> ConfigError:
    """What is said of a layer that cannot be trained."""
    with pytest.raises(ConfigError) as caught:
        layer_adapter(layer, family)
    assert caught.value.where == "model" and "merge them" in caught.value.hint
    return caught.value


def windows_in_masks(model: Any) -> tuple[int | None, ...]:
    """How far each layer of Hugging Face's model looks back, by the mask its attention is given; None: over everything."""
    seen: list[Tensor] = []

    def look(module: nn.Module, arguments: Any, named: Any) -> None:
        seen.append(named["attention_mask"])

    hooks = [layer.self_attn.register_forward_pre_hook(look, with_kwargs=True) for layer in model.model.layers]
    length = 40
    with torch.no_grad():
        model(torch.zeros(1, length, dtype=torch.int64), use_cache=False)
    for hook in hooks:
        hook.remove()
    counts = [int((mask[0, 0, -1] >= 0).sum()) for mask in seen]
    return tuple(None if count == length else count for count in counts)


def assert_windows_alike(folder: Path, family: str, **changes: Any) -> tuple[int | None, ...]:
    """The windows by facts, by the adapters of layers and by the masks of Hugging Face's model are the same; they are returned."""
    spec = model_spec(of(save_model(folder, family, **changes)))
    model = hf_model(family, **changes)
    assert spec.windows == windows_in_masks(model)
    assert spec.windows == tuple(layer_adapter(layer, family).spec.window for layer in model.model.layers)
    return spec.windows


def assert_either_name(folder: Path, family: str, own: str, other: str) -> None:
    """A config.json counts its experts under either name; its own comes first."""
    count = FAMILIES[family][own]
    config = of(save_model(folder, family))
    for names in ({own: count}, {other: count}, {own: count, other: count + 1}):
        edit_config(folder, own, other, **names)
        assert experts_of(config) == count and model_fields(config).given[own] == count


def experts_of(config: ModelConfig) -> int:
    spec = model_spec(config)
    assert spec.experts is not None
    return spec.experts.num_experts
