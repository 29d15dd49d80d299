"""Checks that the fields of a Hugging Face config make a model: every number in its range. Pure."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from ..errors import ConfigError
from .families.expert_facts import Refusal
from .families.facts import FULL, SLIDING, FamilyFacts

_RANGES: Mapping[str, tuple[int, int]] = {
    "num_hidden_layers": (1, 1 << 10),
    "hidden_size": (1, 1 << 20),
    "intermediate_size": (1, 1 << 24),
    "num_attention_heads": (1, 1 << 14),
    "num_key_value_heads": (1, 1 << 14),
    "head_dim": (2, 1 << 14),
    "vocab_size": (1, 1 << 27),
    "max_position_embeddings": (1, 1 << 40),
    "max_window_layers": (0, 1 << 20),
    "sliding_window_pattern": (1, 1 << 20),
    "sliding_window": (1, 1 << 40),
    "num_experts": (1, 1 << 14),
    "num_local_experts": (1, 1 << 14),
    "n_routed_experts": (1, 1 << 14),
    "n_shared_experts": (1, 1 << 14),
    "n_group": (1, 1 << 14),
    "topk_group": (1, 1 << 14),
    "first_k_dense_replace": (0, 1 << 10),
    "num_experts_per_tok": (1, 1 << 14),
    "moe_intermediate_size": (1, 1 << 24),
    "shared_expert_intermediate_size": (1, 1 << 24),
}
"""Sizes, both ends included: larger ones are no model of this decade but a damaged or hostile file."""
_NULLABLE = ("num_key_value_heads", "head_dim", "sliding_window")
_POSITIVE = (
    *("embedding_multiplier", "attention_multiplier", "residual_multiplier", "logits_scaling", "logit_scale", "layer_norm_eps"),
    *("rms_norm_eps", "swiglu_alpha", "swiglu_limit", "routed_scaling_factor"),
    *("query_pre_attn_scalar", "attn_logit_softcapping", "final_logit_softcapping"),
)
_SWITCHES = (
    *("attention_bias", "mlp_bias", "tie_word_embeddings", "use_sliding_window", "use_bidirectional_attention", "norm_topk_prob"),
    *("qkv_bias", "use_qkv_bias", "qk_layernorm", "use_parallel_residual"),
)
ACTIVATIONS = frozenset(
    {
        *("gelu", "gelu_10", "gelu_accurate", "gelu_fast", "gelu_new", "gelu_python", "gelu_python_tanh", "gelu_pytorch_tanh"),
        *("hardswish", "laplace", "leaky_relu", "linear", "mish", "quick_gelu", "relu", "relu2", "relu6", "sigmoid", "silu"),
        *("sqrtsoftplus", "swish", "tanh"),
    }
)
"""What transformers knows by name, but for activations with weights of their own."""


def check_fields(fields: Mapping[str, Any], facts: FamilyFacts, where: str) -> None:
    """Raise ConfigError for the first of `fields` (defaults filled in) that no model has; `where` is their source: `model.path DIR: `."""
    _check_sizes(fields, where)
    _check_shapes(fields, facts, where)
    _check_layer_types(fields, where)
    _check_experts(fields, facts, where)
    _refuse(facts.problem(fields), where)
    _check_windows(fields, facts, where)
    for name in _POSITIVE:
        value = fields.get(name)
        if value is not None and not (_is_number(value) and math.isfinite(value) and value > 0):
            raise _wrong(where, name, value, "a finite number above 0, or nothing")
    for name in _SWITCHES:
        if not isinstance(fields.get(name), (bool, type(None))):
            raise _wrong(where, name, fields[name], "true or false")
    activation = fields.get(facts.activation_field)
    if activation is not None and activation not in ACTIVATIONS:
        raise _wrong(where, facts.activation_field, activation, f"one of {', '.join(sorted(ACTIVATIONS))}")
    if fields.get("use_bidirectional_attention") and "use_bidirectional_attention" in facts.fields:
        raise _wrong(where, "use_bidirectional_attention", True, "false: causal attention, for this trains language models")
    dropout = fields.get("attention_dropout") or 0.0
    if dropout != 0:
        raise _wrong(where, "attention_dropout", dropout, "0: block-wise attention has no dropout")
    spread = fields.get("initializer_range", 0.02)
    if not (_is_number(spread) and math.isfinite(spread) and spread >= 0):
        raise _wrong(where, "initializer_range", spread, "a finite number, 0 or more")


def _check_sizes(fields: Mapping[str, Any], where: str) -> None:
    for name, (least, most) in _RANGES.items():
        value = fields.get(name)
        if value is None and (name in _NULLABLE or name not in fields):
            continue
        if name == "sliding_window" and value == 0 and fields.get("use_sliding_window") is False:
            continue  # as transformers writes a window of Qwen2-MoE that is switched off
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
            raise _wrong(where, name, value, f"a whole number from {least:,} to {most:,}")


def _check_shapes(fields: Mapping[str, Any], facts: FamilyFacts, where: str) -> None:
    hidden, heads = fields["hidden_size"], fields["num_attention_heads"]
    kv_heads = fields.get("num_key_value_heads") or heads
    if heads % kv_heads:
        raise _wrong(where, "num_key_value_heads", kv_heads, f"a divisor of the {heads} heads")
    if hidden % heads and (facts.heads_divide_hidden or not fields.get("head_dim")):
        raise _wrong(where, "num_attention_heads", heads, f"a divisor of the hidden size {hidden}")
    size = fields.get("head_dim") or hidden // heads
    if size % 2:
        raise _wrong(where, "head_dim", size, "an even number, for rotary embeddings turn pairs")
    pad = fields.get("pad_token_id")
    if pad is not None and (isinstance(pad, bool) or not isinstance(pad, int) or not -fields["vocab_size"] <= pad < fields["vocab_size"]):
        raise _wrong(where, "pad_token_id", pad, f"a token id below the vocabulary's {fields['vocab_size']}, or null")


def _check_layer_types(fields: Mapping[str, Any], where: str) -> None:
    types = fields.get("layer_types")
    if types is None:
        return
    layers = fields["num_hidden_layers"]
    if not isinstance(types, (list, tuple)) or len(types) != layers:
        actual = f"{len(types)} entries" if isinstance(types, (list, tuple)) else repr(types)
        raise _wrong(where, "layer_types", actual, f"one for each of the {layers} layers")
    unknown = [kind for kind in types if kind not in (FULL, SLIDING)]
    if unknown:
        raise _wrong(where, "layer_types", unknown[0], f"{FULL} or {SLIDING}")


def _check_experts(fields: Mapping[str, Any], facts: FamilyFacts, where: str) -> None:
    if facts.experts is None:
        return
    count, chosen = fields[facts.experts.count], fields["num_experts_per_tok"]
    if chosen > count:
        raise _wrong(where, "num_experts_per_tok", chosen, f"at most the {count} experts there are ({facts.experts.count})")
    if fields.get("output_router_logits"):
        raise _wrong(where, "output_router_logits", True, "false: no auxiliary loss of the router is trained with")
    _refuse(facts.experts.problem(fields), where)


def _refuse(refusal: Refusal | None, where: str) -> None:
    if refusal is not None:
        raise _wrong(where, refusal.field, refusal.actual, refusal.expected)


def _check_windows(fields: Mapping[str, Any], facts: FamilyFacts, where: str) -> None:
    """Raise ConfigError for layers that are to have a window where there is none: transformers fails at their first mask."""
    types = fields.get("layer_types")
    if not facts.needs_window and not (types and "layer_types" in facts.fields):
        return
    asked = facts.windows({**fields, "sliding_window": 1, "use_sliding_window": True})
    if any(asked) and not any(facts.windows(fields)):
        switch = " and use_sliding_window=true" if "use_sliding_window" in facts.fields else ""
        name = "layer_types" if types else "sliding_window"
        raise _wrong(where, name, fields.get(name) and SLIDING, f"sliding_window=TOKENS{switch}, which these layers need")


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _wrong(where: str, name: str, actual: object, expected: str) -> ConfigError:
    shown = actual if isinstance(actual, str) else repr(actual)
    hint = f"model.extra.{name}=VALUE, or the file as it was published" if where.startswith("model.path") else f"model.extra.{name}=VALUE"
    return ConfigError(f"{where}{name}", found=shown[:80], expected=expected, hint=hint)
