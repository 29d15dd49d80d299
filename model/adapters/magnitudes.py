"""Sets the magnitudes of DoRA where training starts: the norms of rows, so that the model starts as it was."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ...parallel.sharding.parts import memory_of, slices
from .dora import row_norms
from .lora import LoraFactors
from .names import FACTORS, MAGNITUDE, PACKED
from .quantized import QuantizedLinear


@torch.no_grad()
def initialise_magnitudes(model: nn.Module, weights: nn.Module | None = None) -> None:
    """Fill the magnitudes of `model`, or those of the same names in `weights`, from its frozen matrices. Each rank its own rows.

    Call once those are in place; B is zero then. Nothing is done without magnitudes.
    """
    named = dict((model if weights is None else weights).named_parameters())
    for name, module in model.named_modules():
        beside = module._modules.get(FACTORS)
        if isinstance(beside, LoraFactors) and beside._parameters[MAGNITUDE] is not None:
            magnitude = named[f"{name}.{FACTORS}.{MAGNITUDE}"]
            memory_of(magnitude).copy_(row_norms(_own_rows(module, magnitude)))


def _own_rows(module: nn.Module, magnitude: Tensor) -> Tensor:
    """This rank's rows of the matrix that `module` holds, wide: those of its part of the magnitude."""
    whole = module._parameters[PACKED] if isinstance(module, QuantizedLinear) else module._parameters["weight"]
    assert whole is not None and slices(whole)[0] == slices(magnitude)[0], "a matrix and its magnitudes are cut by the same rows"
    return module.matrix()._replace(packed=memory_of(whole)).wide() if isinstance(module, QuantizedLinear) else memory_of(whole)
