"""What is known of a model family without torch: names, defaults, norms, biases, windows, rotary tables. Pure.

Estimates and checks ask these facts (through `ModelSpec`, whose numbers come from here) and never compare with a family's name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ..config import Family

Windows = tuple[int | None, ...]
"""Per layer: tokens attention looks back over, None for all of them."""

DEFAULT_THETA = 10_000.0
"""Base of the rotary angles where nothing else is given."""
SLIDING = "sliding_attention"
FULL = "full_attention"


def no_windows(fields: Mapping[str, Any]) -> Windows:
    """Every layer attends to everything before a token."""
    return (None,) * int(fields["num_hidden_layers"])


@dataclass(frozen=True, kw_only=True, slots=True)
class FamilyFacts:
    """One family, as its Hugging Face classes have it. `fields` below are those of a config.json, defaults filled in."""

    family: Family
    model_type: str
    """What `AutoConfig.for_model` calls it."""
    defaults: Mapping[str, Any]
    """Of the Hugging Face config class, for fields that a config.json may leave out (`save_pretrained` leaves defaults out)."""
    qk_norm: bool = False
    """RMS norm over the head dim of queries and keys."""
    norms_per_layer: int = 2
    """RMS norms over the hidden size in one decoder layer."""
    norm_product_in_float32: bool = False
    """Norms multiply with their weight before they return to the compute precision: more is saved for backward."""
    qkv_bias: Callable[[Mapping[str, Any]], bool] = field(default=lambda fields: bool(fields.get("attention_bias")))
    output_bias: Callable[[Mapping[str, Any]], bool] = field(default=lambda fields: bool(fields.get("attention_bias")))
    mlp_bias: Callable[[Mapping[str, Any]], bool] = field(default=lambda fields: False)
    has_window: bool = True
    """Whether there are sliding windows at all."""
    needs_window: bool = False
    """Whether some layers have one whatever the config says: `model.sliding_window` must be given."""
    windows: Callable[[Mapping[str, Any]], Windows] = no_windows
    window_fields: Callable[[int | None], dict[str, Any]] = field(default=lambda window: {"sliding_window": window})
    """`model.sliding_window` as fields of the Hugging Face config."""
    has_softcap: bool = False
    """Scores and logits go through tanh before their softmax."""
    rope_per_layer_type: bool = False
    """A rotary table for layers with a window and one for the others."""
    default_theta: float = DEFAULT_THETA
    """Base of the rotary angles (of layers without a window, where there are two tables)."""

    @property
    def rotary_tables(self) -> int:
        return 2 if self.rope_per_layer_type else 1
