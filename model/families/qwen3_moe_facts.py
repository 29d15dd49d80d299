"""Qwen3-MoE: norms over each head of queries and keys, one window for all layers or none; layers of experts, some dense where asked."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from ..config import Family
from .expert_facts import EXPERT_FIELDS, ExpertFacts, listed_dense_layers, listed_problem
from .facts import FamilyFacts, Windows
from .qwen2_facts import upper_window_fields


def one_window(fields: Mapping[str, Any]) -> Windows:
    """The same window for every layer, where windows are used at all."""
    window = fields.get("sliding_window") if fields.get("use_sliding_window") else None
    return (window,) * int(fields["num_hidden_layers"])


FACTS = FamilyFacts(
    family=Family.QWEN3_MOE,
    model_type="qwen3_moe",
    has_parity_rows=True,
    defaults={
        "vocab_size": 151936,
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "num_hidden_layers": 24,
        "num_key_value_heads": 4,
        "sliding_window": 4096,
        "moe_intermediate_size": 768,
        "num_experts_per_tok": 8,
        "num_experts": 128,
        "norm_topk_prob": False,
    },
    qk_norm=True,
    fields=EXPERT_FIELDS
    | {"hidden_act", "attention_bias", "use_sliding_window", "sliding_window"}
    | {"num_experts", "moe_intermediate_size", "norm_topk_prob", "decoder_sparse_step", "mlp_only_layers"},
    windows=one_window,
    window_fields=upper_window_fields,
    aliases=MappingProxyType({"num_local_experts": "num_experts"}),
    experts=ExpertFacts(count="num_experts", inner="moe_intermediate_size", dense_layers=listed_dense_layers, problem=listed_problem),
)
