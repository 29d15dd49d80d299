"""Mixtral: Llama's attention, a window for every layer or none; every layer a mixture of experts."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from ..config import Family
from .expert_facts import EXPERT_FIELDS, ExpertFacts, Refusal, StoredNames
from .facts import FamilyFacts
from .mistral_facts import window_everywhere


def no_jitter(fields: Mapping[str, Any]) -> Refusal | None:
    """Refuse noise on the router's inputs: a pass made once more would draw other noise."""
    noise = fields.get("router_jitter_noise") or 0.0
    return Refusal("router_jitter_noise", str(noise), "0: routing has no noise") if noise else None


FACTS = FamilyFacts(
    family=Family.MIXTRAL,
    model_type="mixtral",
    has_parity_rows=True,
    defaults={
        "vocab_size": 32000,
        "intermediate_size": 14336,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "num_experts_per_tok": 2,
        "num_local_experts": 8,
    },
    fields=EXPERT_FIELDS | {"hidden_act", "sliding_window", "num_local_experts", "router_jitter_noise"},
    windows=window_everywhere,
    qkv_bias=lambda fields: False,
    output_bias=lambda fields: False,
    default_theta=1_000_000.0,
    aliases=MappingProxyType({"num_experts": "num_local_experts"}),
    experts=ExpertFacts(
        count="num_local_experts",
        inner="intermediate_size",
        stored=StoredNames(
            gate="block_sparse_moe.experts.{}.w1.weight",
            up="block_sparse_moe.experts.{}.w3.weight",
            down="block_sparse_moe.experts.{}.w2.weight",
            renamed={"mlp.gate.weight": "block_sparse_moe.gate.weight"},
        ),
        problem=no_jitter,
    ),
)
