"""The truth for adapters: peft's LoRA on a plain Hugging Face model, in one process."""

from __future__ import annotations

import numpy as np
import torch
from peft import LoraConfig, get_peft_model

from efflaunch.model.adapters.config import AdapterConfig, AdapterMethod
from efflaunch.model.adapters.peft_config import settings_of
from efflaunch.tests.parity.reference import lift_to_float64, reference_model


def lora(**fields) -> AdapterConfig:
    """Adapters of a rank and a scaling that are nobody's default."""
    return AdapterConfig(name="lora", method=AdapterMethod.LORA, **{"rank": 3, "alpha": 7.0, **fields})


def our_name(name: str) -> str | None:
    """Our name of a parameter inside a model that peft changed; None for the frozen copy of a part that is trained whole."""
    if ".original_module." in name:
        return None
    for theirs, ours in ((".lora_A.default.weight", ".lora.A"), (".lora_B.default.weight", ".lora.B"),
                         (".base_layer.", "."), (".modules_to_save.default.", ".")):  # fmt: skip
        name = name.replace(theirs, ours)
    return name


def peft_model(family: str, dtype: torch.dtype, config: AdapterConfig):
    """(the model with its adapters inside, its parameters by our names); factors are random, so that no gradient is zero."""
    fields = settings_of(config, None)
    wrapped = get_peft_model(reference_model(family, dtype), LoraConfig(**{k: v for k, v in fields.items() if k != "peft_type"} | {
        "inference_mode": False}))  # fmt: skip
    model = wrapped.get_base_model()
    named = {ours: p for name, p in model.named_parameters() if (ours := our_name(name)) is not None}
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in named.items():
            if parameter.requires_grad:
                noise = 0.3 * torch.randn(parameter.shape, generator=generator, dtype=dtype)
                parameter.copy_(noise if ".lora." in name else parameter + noise)
    return model, named


def arrays(named, pick=lambda p: p):
    """Whole arrays of what `pick` finds of each parameter."""
    return {name: np.array(value.detach()) for name, p in named.items() if (value := pick(p)) is not None}


def lifted(family: str, dtype: str, config: AdapterConfig):
    """`peft_model` in a named precision, float64 lifted as on the other side."""
    if dtype == "float64":
        lift_to_float64()
    return peft_model(family, getattr(torch, dtype), config)
