"""Qwen2: biases on queries, keys and values; layers from `max_window_layers` on have a window, where windows are used at all."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..config import Family
from .facts import SLIDING, FamilyFacts, Windows, no_windows


def upper_windows(fields: Mapping[str, Any]) -> Windows:
    """The windows by `layer_types`, or of the layers from `max_window_layers` on; none without `use_sliding_window`."""
    window: int | None = fields.get("sliding_window")
    if not fields.get("use_sliding_window"):
        return no_windows(fields)
    types = fields.get("layer_types")
    slides = (
        [kind == SLIDING for kind in types]
        if types
        else [layer >= fields["max_window_layers"] for layer in range(fields["num_hidden_layers"])]
    )
    return tuple(window if each else None for each in slides)


def upper_window_fields(window: int | None) -> dict[str, Any]:
    """The config fields of a window, which has to be switched on as well."""
    return {"sliding_window": window, "use_sliding_window": window is not None}


FACTS = FamilyFacts(
    family=Family.QWEN2,
    model_type="qwen2",
    has_parity_rows=True,
    defaults={"vocab_size": 151936, "intermediate_size": 22016, "num_key_value_heads": 32, "sliding_window": 4096},
    qkv_bias=lambda fields: True,
    output_bias=lambda fields: False,
    fields=frozenset({"hidden_act", "use_sliding_window", "sliding_window", "max_window_layers", "layer_types"}),
    windows=upper_windows,
    window_fields=upper_window_fields,
)
