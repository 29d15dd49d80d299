"""Writes config.json so that transformers 4 reads it too: rotary settings and precision in old and new form. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

LOWEST_TRANSFORMERS = "4.57"
"""Earliest version that exports are tried with."""


_IN_THREE = {"rope_type", "rope_theta", "short_factor", "long_factor", "original_max_position_embeddings", "partial_rotary_factor"}
"""Keys of rotary settings that version 4 of Phi-3's configuration has words for."""


def with_old_fields(fields: Mapping[str, Any]) -> dict[str, Any]:
    """`fields` of a config.json of transformers 5, and what version 4 reads in their place, which version 5 takes for the same.

    `rope_parameters` becomes `rope_theta` and `rope_scaling` (null: none), of layers with full attention where kinds of layers
    differ, with the others' base in `rope_local_base_freq`; `dtype` becomes `torch_dtype`.
    """
    old: dict[str, Any] = {}
    rope = fields.get("rope_parameters")
    if rope:
        full = rope.get("full_attention") or rope
        old["rope_theta"] = full["rope_theta"]
        old["rope_scaling"] = _scaling(full)
        if full.get("partial_rotary_factor") is not None and full["rope_type"] != "proportional":
            old["partial_rotary_factor"] = full["partial_rotary_factor"]
            old["rope_scaling"] = _without(old["rope_scaling"], "partial_rotary_factor")
        if fields.get("original_max_position_embeddings") is not None and full["rope_type"] == "longrope" and set(full) <= _IN_THREE:
            # Version 4 takes three keys and no others where the length is a field of its own, and refuses what three cannot say.
            old["rope_scaling"] = {"type": "longrope", **{name: full[name] for name in ("short_factor", "long_factor")}}
        if rope.get("sliding_attention"):
            old["rope_local_base_freq"] = rope["sliding_attention"]["rope_theta"]
    if fields.get("dtype") is not None:
        old["torch_dtype"] = fields["dtype"]
    return {**fields, **old}


def unsaid_to_old(fields: Mapping[str, Any]) -> str | None:
    """What the old form has no words for, as one line; None: nothing."""
    local = (fields.get("rope_parameters") or {}).get("sliding_attention")
    if local and _scaling(local) is not None:
        return "transformers before 5 does not read the rotary scaling of layers with sliding windows"
    return None


def _without(block: dict[str, Any] | None, name: str) -> dict[str, Any] | None:
    return None if block is None else {key: value for key, value in block.items() if key != name}


def _scaling(rope: Mapping[str, Any]) -> dict[str, Any] | None:
    """Version 4 knows no default type: none is no scaling."""
    if rope.get("rope_type", "default") == "default":
        return None
    return {key: value for key, value in rope.items() if key != "rope_theta"}
