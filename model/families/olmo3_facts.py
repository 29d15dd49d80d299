"""OLMo 3: OLMo 2's layers, with a window in all but every fourth, and rotary scaling in those without one alone."""

from __future__ import annotations

from ..config import Family
from .facts import FamilyFacts
from .gemma2_facts import patterned_windows

FACTS = FamilyFacts(
    family=Family.OLMO3,
    model_type="olmo3",
    defaults={
        "vocab_size": 50304,
        "intermediate_size": 11008,
        "max_position_embeddings": 2048,
        "pad_token_id": 1,
        "sliding_window": 4096,
    },
    fields=frozenset({"hidden_act", "attention_bias", "sliding_window", "layer_types"}),
    structural=True,
    layer_norms=("post_attention_layernorm", "post_feedforward_layernorm"),
    ends_with_norms=True,
    norm_product_in_float32=True,
    wide_rotation=True,
    wide_tables=True,
    qk_norm=True,
    norm_of_all_heads=True,
    needs_window=True,
    windows=lambda fields: patterned_windows(fields, 4),
    rope_per_layer_type=True,
    default_theta=500_000.0,
    local_theta=500_000.0,
    has_local_theta=False,
)
