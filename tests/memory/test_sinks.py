"""A layer's attention sinks under every policy, against Hugging Face's gpt-oss attention; what is not known of them is refused."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from efflaunch.errors import ConfigError
from efflaunch.memory.executor.sinks import sinks_of
from efflaunch.memory.executor.token_local import GradientSums
from efflaunch.memory.heads import Heads
from efflaunch.memory.policy import KEEP_ALL, MemoryPolicy
from efflaunch.model.build import install
from efflaunch.model.chunked_loss import cross_entropy
from efflaunch.model.families.llama import LlamaLayer
from efflaunch.tests.memory.test_saved import LENGTHS, TOTAL, micro_batch
from efflaunch.tests.parity.gpt_oss_dense import SinkLayer, adapted
from efflaunch.tests.parity.ranks_side import POLICIES, StrictStore
from efflaunch.tests.parity.reference import lift_to_float64, reference_loss, reference_model

ALL_POLICIES = {**POLICIES, "keep, compiled": replace(KEEP_ALL, compile="eager")}
SINKS = [f"model.layers.{layer}.self_attn.sinks" for layer in range(3)]


def model_in_float64() -> Any:
    """Windows, no window, windows; every head's sink takes another share of its rows."""
    lift_to_float64()
    model = reference_model("gpt_oss_dense", torch.float64)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.sinks += torch.arange(8) - 3.0
    return model


@cache
def plain() -> tuple[float, dict[str, Tensor]]:
    model, documents = model_in_float64(), torch.split(micro_batch()[0].token_ids, LENGTHS)
    loss = reference_loss(model, documents, documents)
    loss.backward()
    return loss.item(), {name: parameter.grad for name, parameter in model.named_parameters()}


def ours(policy: MemoryPolicy, trained: str = "") -> tuple[float, dict[str, Tensor | None]]:
    """Loss and gradients, those of the parameters that have `trained` in their names."""
    model, store = model_in_float64(), StrictStore()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(trained in name)
    with adapted():
        install(model, policy, loss_chunk_tokens=16, store=store)
    loss = model(*micro_batch(), lambda head: cross_entropy(head, 1.0 / TOTAL))
    loss.backward()
    assert not store.parcels
    return float(loss.detach()), {name: parameter.grad for name, parameter in model.named_parameters()}


def assert_same(gradient: Tensor | None, exact: Tensor) -> None:
    assert gradient is not None
    torch.testing.assert_close(gradient, exact, rtol=0.0, atol=1e-10 * float(exact.abs().max()))


@pytest.mark.parametrize("name", ALL_POLICIES)
def test_gradients_are_those_of_hugging_face_under_every_policy(name: str) -> None:
    (loss, gradients), (exact_loss, exact) = ours(ALL_POLICIES[name]), plain()
    assert abs(loss - exact_loss) <= 1e-10 * exact_loss
    assert set(SINKS) <= set(gradients) == set(exact)
    for key, gradient in gradients.items():
        assert_same(gradient, exact[key])


@pytest.mark.parametrize("name", ["keep", "recompute", "shares_streamed", "upipe_stored"])
def test_sinks_may_be_all_that_is_trained(name: str) -> None:
    """As where a model without them gets some."""
    _, gradients = ours(POLICIES[name], "sinks")
    for key, exact in plain()[1].items():
        if key in SINKS:
            assert_same(gradients[key], exact)
        else:
            assert gradients[key] is None


@pytest.mark.parametrize("name", ["keep", "recompute", "shares_streamed", "upipe_stored"])
def test_sinks_may_be_frozen(name: str) -> None:
    _, gradients = ours(POLICIES[name], "proj")
    for key, exact in plain()[1].items():
        if "proj" in key:
            assert_same(gradients[key], exact)
        else:
            assert gradients[key] is None


def test_sinks_of_a_group_of_heads_are_in_the_groups_order() -> None:
    layer = reference_model("gpt_oss_dense", torch.float32).model.layers[0]
    adapter, sinks = SinkLayer(layer), layer.self_attn.sinks
    assert sinks_of(adapter) is sinks
    some = sinks_of(adapter, Heads((1, 5), (0, 1)))
    assert some is not None and torch.equal(some, sinks[[1, 5]])
    layer.self_attn.sinks = replacement = nn.Parameter(torch.ones(8))  # as FSDP2 does before each pass
    assert sinks_of(adapter) is replacement
    assert sinks_of(LlamaLayer(reference_model("llama", torch.float32).model.layers[0])) is None


def test_a_gradient_goes_to_one_of_the_layers_own_parameters() -> None:
    first, second = nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(3))
    sums = GradientSums([first, second])
    sums.add_of(second, torch.ones(3))
    sums.add_of(second, torch.ones(3))
    nothing, twice = sums.result()
    assert nothing is None and twice is not None and torch.equal(twice, torch.full((3,), 2.0))
    with pytest.raises(ValueError, match="not in list"):
        sums.add_of(nn.Parameter(torch.zeros(3)), torch.ones(3))


def test_sinks_that_are_not_there_are_refused() -> None:
    model = reference_model("llama", torch.float32)
    with pytest.raises(ConfigError, match=r"no such parameter at self_attn\.sinks.*computed without it"):
        SinkLayer(model.model.layers[0])
    model.model.layers[0].self_attn.sinks = nn.Parameter(torch.zeros(8))
    assert SinkLayer(model.model.layers[0]).sinks is model.model.layers[0].self_attn.sinks
    with pytest.raises(ConfigError, match=r"a parameter that no step of a layer reads at self_attn\.sinks"):
        install(model, KEEP_ALL, loss_chunk_tokens=16)
