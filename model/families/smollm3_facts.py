"""SmolLM3: Llama's layer; every fourth layer does not rotate queries and keys, and windows, where they are used, are of those layers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..config import Family
from .expert_facts import Refusal
from .facts import SLIDING, FamilyFacts, Windows, no_windows
from .qwen2_facts import upper_window_fields


def listed_unrotated(fields: Mapping[str, Any]) -> tuple[int, ...]:
    """Layers whose place in `no_rope_layers` is 0; without such a list every `no_rope_layer_interval`-th."""
    listed, every = fields.get("no_rope_layers"), fields["no_rope_layer_interval"]
    layers = range(fields["num_hidden_layers"])
    return tuple(layer for layer in layers if (not listed[layer] if listed is not None else (layer + 1) % every == 0))


def unrotated_windows(fields: Mapping[str, Any]) -> Windows:
    """The windows by `layer_types`, or of the layers that do not rotate; none without `use_sliding_window`."""
    window: int | None = fields.get("sliding_window")
    if not fields.get("use_sliding_window") or window is None:
        return no_windows(fields)
    types, layers = fields.get("layer_types"), range(fields["num_hidden_layers"])
    slides = {layer for layer in layers if types[layer] == SLIDING} if types else set(listed_unrotated(fields))
    return tuple(window if layer in slides else None for layer in layers)


def unrotated_problem(fields: Mapping[str, Any]) -> Refusal | None:
    """Refuse lists that say nothing of some layer, and intervals that are none."""
    listed, every, layers = fields.get("no_rope_layers"), fields["no_rope_layer_interval"], fields["num_hidden_layers"]
    if isinstance(every, bool) or not isinstance(every, int) or every < 1:
        return Refusal("no_rope_layer_interval", repr(every), "a whole number, 1 or more")
    if listed is None:
        return None
    if not isinstance(listed, (list, tuple)) or len(listed) < layers or any(each not in (0, 1) for each in listed):
        return Refusal("no_rope_layers", repr(listed), f"1 (rotates) or 0 for each of the {layers} layers")
    return None


FACTS = FamilyFacts(
    family=Family.SMOLLM3,
    model_type="smollm3",
    has_parity_rows=True,
    defaults={
        "vocab_size": 128256,
        "hidden_size": 2048,
        "intermediate_size": 11008,
        "num_hidden_layers": 36,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
        "tie_word_embeddings": True,
        "pad_token_id": 128004,
        "no_rope_layer_interval": 4,
    },
    fields=frozenset({"hidden_act", "attention_bias", "mlp_bias", "use_sliding_window", "sliding_window", "layer_types"})
    | {"no_rope_layers", "no_rope_layer_interval"},
    mlp_bias=lambda fields: bool(fields.get("mlp_bias")),
    windows=unrotated_windows,
    window_fields=upper_window_fields,
    unrotated=listed_unrotated,
    problem=unrotated_problem,
    default_theta=2_000_000.0,
)
