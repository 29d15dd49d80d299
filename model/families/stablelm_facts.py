"""StableLM: Llama's layers with LayerNorms that have biases, of which a quarter of each head turns."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..config import Family
from .expert_facts import Refusal
from .facts import FamilyFacts


def problem(fields: Mapping[str, Any]) -> Refusal | None:
    """Refuse dropout, norms of single heads, parallel halves, and a head dim that its code does not read."""
    if fields.get("hidden_dropout"):
        return Refusal("hidden_dropout", str(fields["hidden_dropout"]), "0: layers are computed again in backward, without dropout")
    for name, what in (("qk_layernorm", "norms with weights of each head"), ("use_parallel_residual", "parallel halves")):
        if fields.get(name):
            return Refusal(name, "True", f"false: {what} of StableLM are not trained here")
    size, own = fields.get("head_dim"), fields["hidden_size"] // fields["num_attention_heads"]
    return None if size in (None, own) else Refusal("head_dim", str(size), f"{own}, the hidden size over the heads")


FACTS = FamilyFacts(
    family=Family.STABLELM,
    model_type="stablelm",
    defaults={
        "vocab_size": 50304,
        "hidden_size": 2560,
        "intermediate_size": 6912,
        "num_key_value_heads": 32,
        "max_position_embeddings": 4096,
    },
    fields=frozenset({"hidden_act", "layer_norm_eps", "use_qkv_bias", "qk_layernorm", "use_parallel_residual", "hidden_dropout"})
    | {"partial_rotary_factor"},
    structural=True,
    heads_divide_hidden=True,
    norm_bias=True,
    qkv_bias=lambda fields: bool(fields.get("use_qkv_bias")),
    output_bias=lambda fields: False,
    has_window=False,
    window_fields=lambda window: {},
    partial_rotary=0.25,
    problem=problem,
)
