"""What is a decoder layer of this family?

Two files for each: what is known of it (`NAME_facts.py`, no torch) and its layer adapter (`NAME.py`), listed here, once.
Import `facts_of` for a family's facts, `layer_adapter` for the adapter of one decoder layer.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from types import MappingProxyType
from typing import TYPE_CHECKING

from ...errors import ConfigError
from ..config import Family
from . import (
    dots1_facts,
    gemma2_facts,
    gemma3_facts,
    gpt_oss_facts,
    llama_facts,
    mistral_facts,
    mixtral_facts,
    qwen2_facts,
    qwen2_moe_facts,
    qwen3_facts,
    qwen3_moe_facts,
    smollm3_facts,
)
from .facts import FamilyFacts

if TYPE_CHECKING:
    from torch import nn

    from .adapter import LayerAdapter

FACTS: Mapping[Family, FamilyFacts] = MappingProxyType(
    {
        entry.FACTS.family: entry.FACTS
        for entry in (
            llama_facts,
            mistral_facts,
            qwen2_facts,
            qwen3_facts,
            gemma2_facts,
            gemma3_facts,
            gpt_oss_facts,
            mixtral_facts,
            qwen2_moe_facts,
            qwen3_moe_facts,
            dots1_facts,
            smollm3_facts,
        )
    }
)
"""Every family; `NAME.py` beside its facts holds the adapter, as `LAYER`, and as `DENSE` that of layers without experts among others."""


def facts_of(family: Family) -> FamilyFacts:
    """The facts of `family`."""
    return FACTS[family]


def family_of(model_type: object) -> Family | None:
    """The family that Hugging Face calls `model_type`; None for one without an adapter."""
    return next((family for family, facts in FACTS.items() if facts.model_type == model_type), None)


def wrapped_family(model_type: object) -> Family | None:
    """The family whose config lies under `text_config` in a config of `model_type`."""
    return next((family for family, facts in FACTS.items() if facts.wrapped_by == model_type and model_type is not None), None)


def layer_adapter(layer: nn.Module, model_type: str) -> LayerAdapter:
    """The adapter of one decoder layer; ConfigError names the files to write for a family that has none."""
    family = family_of(model_type)
    if family is None:
        raise ConfigError(
            "model",
            found=f"model type {model_type!r}",
            expected=f"one of {', '.join(facts.model_type for facts in FACTS.values())}",
            hint=f"model/families/{model_type}_facts.py as llama_facts.py, and model/families/{model_type}.py as llama.py",
        )
    module, experts = import_module(f".{family.value}", __package__), FACTS[family].experts
    is_dense = experts is not None and experts.has_dense_layers and not hasattr(layer.mlp, "experts")
    adapter: type[LayerAdapter] = module.DENSE if is_dense else module.LAYER
    return adapter(layer)
