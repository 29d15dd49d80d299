"""Llama 2 and 3: no windows, biases where the config asks for them."""

from __future__ import annotations

from ..config import Family
from .facts import FamilyFacts

FACTS = FamilyFacts(
    family=Family.LLAMA,
    model_type="llama",
    has_parity_rows=True,
    defaults={"vocab_size": 32000, "intermediate_size": 11008, "max_position_embeddings": 2048},
    fields=frozenset({"hidden_act", "attention_bias", "mlp_bias"}),
    unread=frozenset({"pretraining_tp"}),
    heads_divide_hidden=True,
    mlp_bias=lambda fields: bool(fields.get("mlp_bias")),
    has_window=False,
    window_fields=lambda window: {},
)
