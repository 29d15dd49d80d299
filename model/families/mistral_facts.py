"""Mistral: the same window in every layer, no biases."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..config import Family
from .facts import FamilyFacts, Windows


def window_everywhere(fields: Mapping[str, Any]) -> Windows:
    """The same window for every layer, where one is given."""
    return (fields.get("sliding_window"),) * int(fields["num_hidden_layers"])


FACTS = FamilyFacts(
    family=Family.MISTRAL,
    model_type="mistral",
    has_parity_rows=True,
    wrapped_by="mistral3",
    defaults={
        "vocab_size": 32000,
        "intermediate_size": 14336,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "sliding_window": 4096,
    },
    fields=frozenset({"hidden_act", "sliding_window"}),
    qkv_bias=lambda fields: False,
    output_bias=lambda fields: False,
    windows=window_everywhere,
)
