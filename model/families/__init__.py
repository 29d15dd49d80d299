"""What is a decoder layer of this family?

What is known of it is `NAME_facts.py` (no torch), listed here, once. What computes its layers is an adapter of its own (`NAME.py`),
or, of families that are `structural`, the one that reads a layer's modules (`structural.py`). Import `facts_of` for a family's facts,
`layer_adapter` for the adapter of one decoder layer.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from ...errors import ConfigError
from ..config import Family
from . import (
    cohere2_facts,
    dots1_facts,
    gemma2_facts,
    gemma3_facts,
    glm4_facts,
    gpt_oss_facts,
    granite_facts,
    llama_facts,
    ministral_facts,
    mistral_facts,
    mixtral_facts,
    olmo2_facts,
    olmo3_facts,
    phi3_facts,
    qwen2_facts,
    qwen2_moe_facts,
    qwen3_facts,
    qwen3_moe_facts,
    smollm3_facts,
    stablelm_facts,
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
            olmo2_facts,
            olmo3_facts,
            phi3_facts,
            granite_facts,
            glm4_facts,
            cohere2_facts,
            ministral_facts,
            stablelm_facts,
        )
    }
)
"""Every family; `NAME.py` beside its facts, unless they are `structural`, holds the adapter, as `LAYER`, and as `DENSE` that of layers
without experts among others."""


def facts_of(family: Family) -> FamilyFacts:
    """The facts of `family`."""
    return FACTS[family]


def family_of(model_type: object) -> Family | None:
    """The family that Hugging Face calls `model_type`; None for one without an adapter."""
    return next((family for family, facts in FACTS.items() if facts.model_type == model_type), None)


def wrapped_family(config: Mapping[str, Any]) -> Family | None:
    """The family whose config lies under `text_config` in this config.json; None where that is of another type, or there is none."""
    outer, text = config.get("model_type"), config.get("text_config")
    inner = text.get("model_type") if isinstance(text, Mapping) else None
    matches = (family for family, facts in FACTS.items() if facts.wrapped_by == outer and inner in (None, facts.model_type))
    return None if outer is None else next(matches, None)


def layer_adapter(layer: nn.Module, model_type: str) -> LayerAdapter:
    """The adapter of one decoder layer; ConfigError names the files to write for a family that has none."""
    family = family_of(model_type)
    if family is None:
        raise ConfigError(
            "model",
            found=f"model type {model_type!r}",
            expected=f"one of {', '.join(facts.model_type for facts in FACTS.values())}",
            hint=f"model/families/{model_type}_facts.py as granite_facts.py where structure.py knows its layers, or an adapter beside it",
        )
    if FACTS[family].structural:
        structural: type[LayerAdapter] = import_module(".structural", __package__).StructuralLayer
        return structural(layer)
    module, experts = import_module(f".{family.value}", __package__), FACTS[family].experts
    is_dense = experts is not None and experts.has_dense_layers and not hasattr(layer.mlp, "experts")
    adapter: type[LayerAdapter] = module.DENSE if is_dense else module.LAYER
    return adapter(layer)
