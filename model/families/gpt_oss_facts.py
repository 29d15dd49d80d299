"""gpt-oss: attention sinks, biases, a window in every other layer; every layer a mixture of experts with biases."""

from __future__ import annotations

from types import MappingProxyType

from ..config import Family
from .expert_facts import EXPERT_FIELDS, ExpertFacts
from .facts import FamilyFacts
from .gemma2_facts import patterned_windows

FACTS = FamilyFacts(
    family=Family.GPT_OSS,
    model_type="gpt_oss",
    has_parity_rows=True,
    defaults={
        "vocab_size": 201088,
        "hidden_size": 2880,
        "intermediate_size": 2880,
        "num_hidden_layers": 36,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "max_position_embeddings": 131072,
        "sliding_window": 128,
        "attention_bias": True,
        "hidden_act": "silu",
        "num_local_experts": 128,
        "num_experts_per_tok": 4,
    },
    fields=EXPERT_FIELDS | {"attention_bias", "sliding_window", "layer_types", "num_local_experts", "swiglu_alpha", "swiglu_limit"},
    unread=frozenset({"hidden_act", "initial_context_length", "experts_per_token"}),
    attention_sinks=True,
    norm_product_in_float32=True,
    needs_window=True,
    windows=lambda fields: patterned_windows(fields, 2),
    default_theta=150_000.0,
    default_rope=MappingProxyType(
        {
            "rope_type": "yarn",
            "factor": 32.0,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "truncate": False,
            "original_max_position_embeddings": 4096,
        }
    ),
    aliases=MappingProxyType({"num_experts": "num_local_experts"}),
    experts=ExpertFacts(
        count="num_local_experts",
        inner="intermediate_size",
        stored=None,
        router="mlp.router",
        has_router_bias=True,
        has_biases=True,
        transposed=True,
    ),
)
