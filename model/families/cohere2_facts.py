"""Command R7B and A (Cohere 2): parallel halves behind one LayerNorm; layers without a window do not rotate; logits are scaled."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..config import Family
from .facts import FamilyFacts, Windows
from .gemma2_facts import patterned_windows

_PERIOD = 4


def windows(fields: Mapping[str, Any]) -> Windows:
    """The windows by `layer_types`, or of all layers but every `sliding_window_pattern`-th."""
    return patterned_windows(fields, fields.get("sliding_window_pattern") or _PERIOD)


def without_window(fields: Mapping[str, Any]) -> tuple[int, ...]:
    """The layers without a window: they do not rotate."""
    return tuple(layer for layer, window in enumerate(windows(fields)) if window is None)


FACTS = FamilyFacts(
    family=Family.COHERE2,
    model_type="cohere2",
    has_parity_rows=True,
    defaults={
        "vocab_size": 256000,
        "hidden_size": 8192,
        "intermediate_size": 22528,
        "num_hidden_layers": 40,
        "num_attention_heads": 64,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": True,
        "pad_token_id": 0,
        "sliding_window": 4096,
        "sliding_window_pattern": _PERIOD,
        "logit_scale": 0.0625,
    },
    fields=frozenset({"hidden_act", "attention_bias", "layer_norm_eps", "logit_scale"})
    | {"sliding_window", "sliding_window_pattern", "layer_types"},
    structural=True,
    heads_divide_hidden=True,
    layer_norms=("input_layernorm",),
    norm_product_in_float32=True,
    parallel=True,
    wide_rotation=True,
    needs_window=True,
    windows=windows,
    unrotated=without_window,
    logit_scale=lambda fields: float(fields.get("logit_scale", 0.0625)),
)
