"""dots.llm1: norms over each head of queries and keys, windows from a layer on; first dense layers, then DeepSeek-V3's experts."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from ..config import Family
from .expert_facts import ExpertFacts, Refusal
from .facts import SLIDING, FamilyFacts, Windows, no_windows


def later_windows(fields: Mapping[str, Any]) -> Windows:
    """The windows by `layer_types`, or of the layers from `max_window_layers` on."""
    window, types, layers = fields.get("sliding_window"), fields.get("layer_types"), fields["num_hidden_layers"]
    if window is None:
        return no_windows(fields)
    slides = [kind == SLIDING for kind in types] if types else [layer >= fields["max_window_layers"] for layer in range(layers)]
    return tuple(window if each else None for each in slides)


def first_layers(fields: Mapping[str, Any]) -> tuple[int, ...]:
    """The first `first_k_dense_replace` layers."""
    return tuple(range(fields["first_k_dense_replace"]))


def group_problem(fields: Mapping[str, Any]) -> Refusal | None:
    """Refuse groups that experts do not divide into, or that leave too few to choose from; and models without experts."""
    count, groups, taken = (fields[name] for name in ("n_routed_experts", "n_group", "topk_group"))
    if count % groups or count // groups < 2:
        return Refusal("n_group", str(groups), f"a divisor of the {count} experts, 2 of them in a group at least")
    if taken > groups:
        return Refusal("topk_group", str(taken), f"at most the {groups} groups there are (n_group)")
    if fields["num_experts_per_tok"] > taken * count // groups:
        within = f"at most the {taken * count // groups} experts of {taken} groups (topk_group)"
        return Refusal("num_experts_per_tok", str(fields["num_experts_per_tok"]), within)
    dense, layers = fields["first_k_dense_replace"], fields["num_hidden_layers"]
    return None if dense < layers else Refusal("first_k_dense_replace", str(dense), f"below the {layers} layers: some have experts")


FACTS = FamilyFacts(
    family=Family.DOTS1,
    model_type="dots1",
    has_parity_rows=True,
    defaults={
        "vocab_size": 152064,
        "hidden_size": 4608,
        "intermediate_size": 10944,
        "num_hidden_layers": 62,
        "num_key_value_heads": 32,
        "max_position_embeddings": 2048,
        "sliding_window": 4096,
        "max_window_layers": 62,
        "moe_intermediate_size": 1408,
        "n_shared_experts": None,
        "n_routed_experts": None,
        "n_group": 1,
        "topk_group": 1,
        "num_experts_per_tok": None,
        "first_k_dense_replace": 0,
        "norm_topk_prob": False,
        "routed_scaling_factor": 1.0,
    },
    qk_norm=True,
    fields=frozenset({"hidden_act", "attention_bias", "sliding_window", "max_window_layers", "layer_types"})
    | {"n_routed_experts", "n_shared_experts", "num_experts_per_tok", "moe_intermediate_size", "first_k_dense_replace"}
    | {"n_group", "topk_group", "norm_topk_prob", "routed_scaling_factor", "output_router_logits"},
    windows=later_windows,
    aliases=MappingProxyType({"num_local_experts": "n_routed_experts"}),
    experts=ExpertFacts(
        count="n_routed_experts",
        inner="moe_intermediate_size",
        shared=lambda fields: int(fields["n_shared_experts"] * fields["moe_intermediate_size"]),
        shared_name="mlp.shared_experts",
        dense_layers=first_layers,
        correction_bias="e_score_correction_bias",
        has_wide_router=True,
        problem=group_problem,
    ),
)
