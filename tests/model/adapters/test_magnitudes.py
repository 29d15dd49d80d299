"""Magnitudes start as the norms of rows, those of packed matrices as of the numbers in them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from efflaunch.model.adapters.magnitudes import initialise_magnitudes
from efflaunch.model.adapters.names import PACKED, target_names
from efflaunch.model.adapters.quantized import QuantizedLinear, fill_levels, insert_quantized
from efflaunch.tests.model.adapters.test_peft_config import OURS
from efflaunch.tests.model.adapters.test_peft_files import adapted
from efflaunch.tests.parity.reference import hf_config

DORA = replace(OURS, dora=True)


def started(seed: int = 0):
    """A model with factors and magnitudes beside its matrices, as training starts."""
    model = adapted(seed, DORA)
    initialise_magnitudes(model)
    return model


@pytest.mark.parametrize("packed", [False, True])
def test_magnitudes_start_as_the_norms_of_their_rows(packed: bool) -> None:
    model, matrices = adapted(0, DORA), {}
    for layer in model.model.layers if packed else ():
        plain = {name: layer.get_submodule(name) for name in target_names(DORA) if "gate_up" not in name}
        insert_quantized(layer, tuple(plain), torch.float32)
        fill_levels(layer)
        for name, linear in plain.items():
            layer.get_submodule(name).fill_from(linear, {PACKED: layer.get_submodule(name).get_parameter(PACKED)})
    initialise_magnitudes(model)
    for name, module in model.named_modules():
        if "lora" in module._modules:
            matrices[name] = module.matrix().wide() if packed else module.weight
            assert isinstance(module, QuantizedLinear) == packed
            torch.testing.assert_close(module.lora.magnitude, matrices[name].norm(dim=1))
    assert len(matrices) == 4 * hf_config("llama").num_hidden_layers


def test_those_of_other_weights_are_filled_and_models_without_stay_as_they_are() -> None:
    model, other = adapted(0, DORA), adapted(1, DORA)
    initialise_magnitudes(model, other)
    assert float(model.model.layers[0].mlp.up_proj.lora.magnitude.detach().std()) == 0.0, "ones"
    torch.testing.assert_close(other.model.layers[0].mlp.up_proj.lora.magnitude, model.model.layers[0].mlp.up_proj.weight.norm(dim=1))
    plain = adapted()
    before = {name: p.clone() for name, p in plain.named_parameters()}
    initialise_magnitudes(plain)
    assert all(torch.equal(p, before[name]) for name, p in plain.named_parameters())
