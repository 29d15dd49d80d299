"""GLM-4 (0414): norms before and after both halves, one matrix for gate and up, and half of each head turns, by neighbours."""

from __future__ import annotations

from ..config import Family
from .facts import FamilyFacts

FACTS = FamilyFacts(
    family=Family.GLM4,
    model_type="glm4",
    has_parity_rows=True,
    defaults={
        "vocab_size": 151552,
        "intermediate_size": 13696,
        "num_hidden_layers": 40,
        "num_key_value_heads": 2,
        "head_dim": 128,
        "max_position_embeddings": 131072,
        "pad_token_id": 151329,
        "attention_bias": True,
    },
    fields=frozenset({"hidden_act", "attention_bias", "partial_rotary_factor"}),
    structural=True,
    layer_norms=("input_layernorm", "post_attention_layernorm", "post_self_attn_layernorm", "post_mlp_layernorm"),
    ends_with_norms=True,
    fused_gate_up=True,
    output_bias=lambda fields: False,
    has_window=False,
    window_fields=lambda window: {},
    partial_rotary=0.5,
)
