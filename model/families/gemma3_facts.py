"""Gemma 3's text model: norms as in Gemma 2, norms per head, no softcaps, two rotary tables, a window in all but every sixth layer."""

from __future__ import annotations

from ..config import Family
from .facts import FamilyFacts
from .gemma2_facts import patterned_windows

FACTS = FamilyFacts(
    family=Family.GEMMA3,
    model_type="gemma3_text",
    has_parity_rows=True,
    defaults={
        "vocab_size": 262208,
        "hidden_size": 2304,
        "intermediate_size": 9216,
        "num_hidden_layers": 26,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "max_position_embeddings": 131072,
        "sliding_window": 4096,
        "tie_word_embeddings": True,
    },
    qk_norm=True,
    fields=frozenset(
        {
            *("hidden_activation", "attention_bias", "query_pre_attn_scalar", "sliding_window", "layer_types"),
            *("final_logit_softcapping", "sliding_window_pattern", "use_bidirectional_attention"),
        }
    ),
    unread=frozenset({"attn_logit_softcapping"}),
    wrapped_by="gemma3",
    activation_field="hidden_activation",
    heads_divide_hidden=True,
    layer_norms=("input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm"),
    ends_with_norms=True,
    norm_offset=1.0,
    norm_product_in_float32=True,
    needs_window=True,
    has_logit_softcap=True,
    windows=lambda fields: patterned_windows(fields, fields["sliding_window_pattern"]),
    rope_per_layer_type=True,
    default_theta=1_000_000.0,
)
