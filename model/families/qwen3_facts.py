"""Qwen3: norms over each head of queries and keys; windows as in Qwen2."""

from __future__ import annotations

from ..config import Family
from .facts import FamilyFacts
from .qwen2_facts import upper_window_fields, upper_windows

FACTS = FamilyFacts(
    family=Family.QWEN3,
    model_type="qwen3",
    has_parity_rows=True,
    defaults={
        "vocab_size": 151936,
        "intermediate_size": 22016,
        "num_key_value_heads": 32,
        "head_dim": 128,
        "sliding_window": 4096,
    },
    qk_norm=True,
    fields=frozenset({"hidden_act", "attention_bias", "use_sliding_window", "sliding_window", "max_window_layers", "layer_types"}),
    windows=upper_windows,
    window_fields=upper_window_fields,
)
