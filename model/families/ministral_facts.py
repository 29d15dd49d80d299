"""Ministral: Mistral's layers, each with the window or without as its type says."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..config import Family
from .facts import SLIDING, FamilyFacts, Windows
from .mistral_facts import window_everywhere


def typed_windows(fields: Mapping[str, Any]) -> Windows:
    """The windows by `layer_types`; of all layers where none are listed."""
    types = fields.get("layer_types")
    return tuple(fields.get("sliding_window") if kind == SLIDING else None for kind in types) if types else window_everywhere(fields)


FACTS = FamilyFacts(
    family=Family.MINISTRAL,
    model_type="ministral",
    defaults={
        "vocab_size": 32000,
        "intermediate_size": 14336,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "sliding_window": 4096,
    },
    fields=frozenset({"hidden_act", "sliding_window", "layer_types"}),
    structural=True,
    qkv_bias=lambda fields: False,
    output_bias=lambda fields: False,
    windows=typed_windows,
)
