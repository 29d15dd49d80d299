"""Granite 3: Llama's layers with four multipliers: of embeddings, of scores, of what is added to the residual, and of logits."""

from __future__ import annotations

from ..config import Family
from .facts import FamilyFacts

FACTS = FamilyFacts(
    family=Family.GRANITE,
    model_type="granite",
    has_parity_rows=True,
    defaults={"vocab_size": 32000, "intermediate_size": 11008, "max_position_embeddings": 2048},
    fields=frozenset({"hidden_act", "attention_bias", "mlp_bias"})
    | {"embedding_multiplier", "attention_multiplier", "residual_multiplier", "logits_scaling"},
    structural=True,
    mlp_bias=lambda fields: bool(fields.get("mlp_bias")),
    has_window=False,
    window_fields=lambda window: {},
    embedding_scale=lambda fields: float(fields.get("embedding_multiplier") or 1.0),
    logit_scale=lambda fields: 1.0 / float(fields.get("logits_scaling") or 1.0),
)
