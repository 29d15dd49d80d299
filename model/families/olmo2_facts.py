"""OLMo 2: norms after attention and after the feed-forward, none before, and over all heads of queries and of keys together."""

from __future__ import annotations

from ..config import Family
from .facts import FamilyFacts

FACTS = FamilyFacts(
    family=Family.OLMO2,
    model_type="olmo2",
    has_parity_rows=True,
    defaults={"vocab_size": 50304, "intermediate_size": 11008, "max_position_embeddings": 2048, "pad_token_id": 1},
    fields=frozenset({"hidden_act", "attention_bias"}),
    structural=True,
    layer_norms=("post_attention_layernorm", "post_feedforward_layernorm"),
    ends_with_norms=True,
    norm_product_in_float32=True,
    wide_rotation=True,
    wide_tables=True,
    qk_norm=True,
    norm_of_all_heads=True,
    has_window=False,
    window_fields=lambda window: {},
)
