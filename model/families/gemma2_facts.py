"""Gemma 2: norms before and after both halves, every other layer has a window, softcaps on scores and logits."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..config import Family
from .facts import SLIDING, FamilyFacts, Windows


def patterned_windows(fields: Mapping[str, Any], period: int) -> Windows:
    """The windows by `layer_types`, or of all layers but every `period`-th."""
    window: int | None = fields.get("sliding_window")
    types = fields.get("layer_types")
    slides = [kind == SLIDING for kind in types] if types else [bool((layer + 1) % period) for layer in range(fields["num_hidden_layers"])]
    return tuple(window if each else None for each in slides)


FACTS = FamilyFacts(
    family=Family.GEMMA2,
    model_type="gemma2",
    has_parity_rows=True,
    defaults={
        "vocab_size": 256000,
        "hidden_size": 2304,
        "intermediate_size": 9216,
        "num_hidden_layers": 26,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "max_position_embeddings": 8192,
        "sliding_window": 4096,
        "tie_word_embeddings": True,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
    },
    fields=frozenset(
        {
            *("hidden_activation", "attention_bias", "query_pre_attn_scalar", "sliding_window", "layer_types"),
            *("final_logit_softcapping", "attn_logit_softcapping", "use_bidirectional_attention"),
        }
    ),
    activation_field="hidden_activation",
    heads_divide_hidden=True,
    layer_norms=("input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm"),
    ends_with_norms=True,
    norm_offset=1.0,
    norm_product_in_float32=True,
    needs_window=True,
    windows=lambda fields: patterned_windows(fields, 2),
    has_score_softcap=True,
    has_logit_softcap=True,
)
