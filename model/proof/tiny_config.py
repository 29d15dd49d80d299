"""Shrinks a model to a tiny one of the same structure: every kind of layer once, ratios and switches as they are. Imports no torch.

What is no supported decoder is refused here by the checks that training makes (`model_spec`). Sizes go down; what decides which way a
layer computes stays: heads per key/value head, experts per token, groups of experts, rotary scaling, softcaps, biases. What a tiny
input would never reach is brought within its reach: windows, clamps, the length from which rotary tables change.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

from ..config import ModelConfig
from ..families.facts import FULL, SLIDING
from ..hf_fields import ModelFields, model_fields
from ..rope_fields import ORIGINAL
from ..spec import ModelSpec, model_spec

VOCABULARY = 97
WINDOW = 11
"""Tokens that layers with a window look back over: fewer than most documents of the comparison have."""
LENGTH_SEEN = 24
"""Length from which rotary tables that depend on it change: some documents of the comparison are longer, some are not."""
CLAMP = 0.5
"""Limit of activations that are clamped: random ones reach it."""
_KV_HEADS, _HEAD_DIM, _SMALL_HEAD_DIM, _MANY_HEADS = 2, 16, 8, 8
_LEAST_LAYERS = 2
_LEAST_WIDTH = 4
_WIDTHS = ("intermediate_size", "moe_intermediate_size", "shared_expert_intermediate_size")


@dataclass(frozen=True, slots=True)
class TinyConfig:
    """A tiny model in place of a large one."""

    fields: Mapping[str, Any]
    """Arguments of `build.build_config`."""
    spec: ModelSpec
    """The sizes of the large model."""
    layers: tuple[int, ...]
    """Numbers of the large model's layers that it has, in their order."""


def tiny_config(config: ModelConfig, least_layers: int = _LEAST_LAYERS) -> TinyConfig:
    """The tiny copy of a config. ConfigError where it is none that can be trained, as training would raise it."""
    spec, model = model_spec(config), model_fields(config)
    layers = kept_layers(spec, least_layers)
    sizes = _sizes(spec, model)
    fields = {
        **model.given,
        **sizes,
        **_widths(model.full, sizes["hidden_size"]),
        **_experts(model),
        **_layers(spec.of_layers(layers), model),
        **_reachable(model, spec, sizes),
        **_positions(model, spec, sizes),
        **_tokens(model.full),
    }
    if "layer_types" not in model.facts.fields:
        fields.pop("layer_types", None)  # of all the layers there were, and no layer reads it
    return TinyConfig(fields, spec, layers)


def kept_layers(spec: ModelSpec, least: int = _LEAST_LAYERS) -> tuple[int, ...]:
    """Numbers of the first layer of every kind, in their order: kinds differ in window, experts, rotation. `least` layers, if there are."""
    kinds: dict[tuple[int | None, bool, bool], int] = {}
    for layer, window in enumerate(spec.windows):
        kinds.setdefault((window, layer in spec.dense_layers, layer in spec.unrotated_layers), layer)
    kept = set(kinds.values())
    others = (layer for layer in range(spec.num_layers) if layer not in kept)
    return tuple(sorted([*kept, *list(others)[: max(least - len(kept), 0)]]))


def _sizes(spec: ModelSpec, model: ModelFields) -> dict[str, int]:
    """Heads in their true ratio, and a hidden size in its true ratio to them."""
    kv_heads = min(spec.num_kv_heads, _KV_HEADS)
    heads = kv_heads * (spec.num_heads // spec.num_kv_heads)
    head_dim = _HEAD_DIM if heads <= _MANY_HEADS else _SMALL_HEAD_DIM
    step = heads if model.facts.heads_divide_hidden else 2
    hidden = max(round(heads * head_dim * spec.hidden_size / spec.query_size / step), 1) * step
    sizes = {"num_attention_heads": heads, "num_key_value_heads": kv_heads, "hidden_size": hidden}
    # Where it is not given it is the hidden size over the heads, of the tiny model as well.
    return {**sizes, "head_dim": head_dim} if model.full.get("head_dim") else sizes


def _widths(full: Mapping[str, Any], hidden: int) -> dict[str, int]:
    """Widths of feed-forwards, in their true ratio to the hidden size."""
    share = hidden / full["hidden_size"]
    return {name: max(round(full[name] * share / 2) * 2, _LEAST_WIDTH) for name in _WIDTHS if full.get(name)}


def _experts(model: ModelFields) -> dict[str, int]:
    """Twice as many experts as the groups that are taken need for one token, if there are; all else of routing stays."""
    facts, full = model.facts.experts, model.full
    if facts is None:
        return {}
    groups, taken = full.get("n_group") or 1, full.get("topk_group") or 1
    in_group = min(max(-(-2 * full["num_experts_per_tok"] // taken), 2), full[facts.count] // groups)
    return {facts.count: groups * in_group}


def _layers(kept: ModelSpec, model: ModelFields) -> dict[str, Any]:
    """The kinds of the layers that are kept, spelled out."""
    facts, out = model.facts, cast(dict[str, Any], {"num_hidden_layers": kept.num_layers})
    if "layer_types" in facts.fields:
        out["layer_types"] = [FULL if window is None else SLIDING for window in kept.windows]
    if "first_k_dense_replace" in facts.fields:
        out["first_k_dense_replace"] = len(kept.dense_layers)
    if "no_rope_layers" in facts.fields:
        out["no_rope_layers"] = [int(layer not in kept.unrotated_layers) for layer in range(kept.num_layers)]
    if "mlp_only_layers" in facts.fields:
        out |= {"mlp_only_layers": list(kept.dense_layers), "decoder_sparse_step": 1}
    return out


def _reachable(model: ModelFields, spec: ModelSpec, sizes: Mapping[str, int]) -> dict[str, Any]:
    """Settings that depend on sizes or on magnitudes."""
    out: dict[str, Any] = {}
    if any(window is not None for window in spec.windows):
        out["sliding_window"] = WINDOW
    if "swiglu_limit" in model.facts.fields:
        out["swiglu_limit"] = CLAMP
    scalar = model.full.get("query_pre_attn_scalar")
    if scalar is not None:
        out["query_pre_attn_scalar"] = max(round(scalar * _head_dim(sizes) / spec.head_dim), 1)
    if "attention_multiplier" in model.facts.fields:
        out["attention_multiplier"] = model.full.get("attention_multiplier", 1.0) * spec.head_dim / _head_dim(sizes)
    return out


def _positions(model: ModelFields, spec: ModelSpec, sizes: Mapping[str, int]) -> dict[str, Any]:
    """Rotary settings as they are, but for lengths that documents would have to exceed, and one factor per pair of a head."""
    parameters, positions = model.rope.parameters, model.rope.positions
    nested = any(isinstance(value, Mapping) for value in parameters.values())
    blocks = {key: dict(block) for key, block in (parameters.items() if nested else [("", parameters)])}
    for block in blocks.values():
        if block["rope_type"] == "dynamic":
            positions = LENGTH_SEEN
        elif block["rope_type"] == "longrope":
            positions = max(round(LENGTH_SEEN * model.rope.positions / block[ORIGINAL]), LENGTH_SEEN)
            block[ORIGINAL] = LENGTH_SEEN
            for name in ("short_factor", "long_factor"):
                block[name] = _sample(block[name], int(_head_dim(sizes) * block.get("partial_rotary_factor", 1.0)) // 2)
    outer = {ORIGINAL: blocks[""][ORIGINAL]} if model.facts.outer_original_length and ORIGINAL in blocks.get("", {}) else {}
    return {"rope_parameters": blocks if nested else blocks[""], "max_position_embeddings": positions, **outer}


def _tokens(full: Mapping[str, Any]) -> dict[str, Any]:
    """A small vocabulary; a padding token is one of it, for its row has no gradient."""
    pad = {} if full.get("pad_token_id") is None else {"pad_token_id": 0}
    return {"vocab_size": VOCABULARY, "bos_token_id": 1, "eos_token_id": 2, **pad}


def _head_dim(sizes: Mapping[str, int]) -> int:
    return sizes.get("head_dim") or sizes["hidden_size"] // sizes["num_attention_heads"]


def _sample(numbers: list[float], count: int) -> list[float]:
    return [numbers[place * len(numbers) // count] for place in range(count)]
