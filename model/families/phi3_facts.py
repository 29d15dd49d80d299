"""Phi-3 and Phi-4: one matrix for queries, keys and values, one for gate and up; a part of each head may turn."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from ..config import Family
from .expert_facts import Refusal
from .facts import FamilyFacts
from .mistral_facts import window_everywhere

DROPOUTS = ("resid_pdrop", "embd_pdrop")


def dropout_problem(fields: Mapping[str, Any]) -> Refusal | None:
    """Refuse dropout, which recomputed layers would draw anew."""
    asked = next((name for name in DROPOUTS if fields.get(name)), None)
    return None if asked is None else Refusal(asked, str(fields[asked]), "0: layers are computed again in backward, without dropout")


FACTS = FamilyFacts(
    family=Family.PHI3,
    model_type="phi3",
    has_parity_rows=True,
    defaults={
        "vocab_size": 32064,
        "hidden_size": 3072,
        "intermediate_size": 8192,
        "max_position_embeddings": 4096,
        "pad_token_id": 32000,
        "eos_token_id": 32000,
        "original_max_position_embeddings": 4096,
    },
    fields=frozenset({"hidden_act", "sliding_window", "partial_rotary_factor", *DROPOUTS}),
    structural=True,
    heads_divide_hidden=True,
    fused_qkv=True,
    fused_gate_up=True,
    qkv_bias=lambda fields: False,
    output_bias=lambda fields: False,
    windows=window_everywhere,
    partial_rotary=1.0,
    outer_original_length=True,
    rope_types=("default", "longrope"),
    rope_type_aliases=MappingProxyType({"su": "longrope", "yarn": "longrope"}),
    problem=dropout_problem,
)
