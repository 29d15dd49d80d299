"""Qwen2-MoE: biases on queries, keys and values, a window in every other layer; experts with a shared one, some layers dense
where the config says so."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from ..config import Family
from .expert_facts import EXPERT_FIELDS, ExpertFacts, listed_dense_layers, listed_problem
from .facts import SLIDING, FamilyFacts, Windows, no_windows
from .qwen2_facts import upper_window_fields


def alternate_windows(fields: Mapping[str, Any]) -> Windows:
    """The windows by `layer_types`, or of every other of the first `max_window_layers` layers; none without `use_sliding_window`."""
    window: int | None = fields.get("sliding_window")
    if not fields.get("use_sliding_window"):
        return no_windows(fields)
    first, types = fields["max_window_layers"], fields.get("layer_types")
    layers = range(fields["num_hidden_layers"])
    slides = [kind == SLIDING for kind in types] if types else [layer % 2 == 0 and layer < first for layer in layers]
    return tuple(window if each else None for each in slides)


FACTS = FamilyFacts(
    family=Family.QWEN2_MOE,
    model_type="qwen2_moe",
    has_parity_rows=True,
    defaults={
        "vocab_size": 151936,
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "sliding_window": 4096,
        "moe_intermediate_size": 1408,
        "shared_expert_intermediate_size": 5632,
        "num_experts_per_tok": 4,
        "num_experts": 60,
        "norm_topk_prob": False,
    },
    qkv_bias=lambda fields: bool(fields.get("qkv_bias", True)),
    output_bias=lambda fields: False,
    fields=EXPERT_FIELDS
    | {"hidden_act", "qkv_bias", "use_sliding_window", "sliding_window", "max_window_layers", "layer_types"}
    | {"num_experts", "moe_intermediate_size", "shared_expert_intermediate_size", "norm_topk_prob", "decoder_sparse_step"}
    | {"mlp_only_layers"},
    windows=alternate_windows,
    window_fields=upper_window_fields,
    aliases=MappingProxyType({"num_local_experts": "num_experts"}),
    experts=ExpertFacts(
        count="num_experts",
        inner="moe_intermediate_size",
        shared=lambda fields: int(fields["shared_expert_intermediate_size"]),
        has_shared_gate=True,
        dense_layers=listed_dense_layers,
        problem=listed_problem,
    ),
)
