"""Rotary tables for packed documents. The frequencies of every scaling variant are Hugging Face's own; nothing depends on the plan.

Note: "dynamic" and "longrope" tables depend on the length seen. Here that is always the document's own, as if it had been run
alone, whichever rank holds it and whatever shares its pack.

Note: angles are products of one position and one frequency, in float32 at least, and never a matrix product, as which some versions of
transformers write them. A GPU may round the factors of those to TF32's 10 bits of mantissa: position 1,000,003 becomes 999,936.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from . import facts_of, family_of
from .adapter import Rope

BY_LENGTH = ("dynamic", "longrope")
"""Rotary types whose tables depend on the length seen."""
UNROTATED = "unrotated"
"""Key of the table of layers that do not rotate."""


def rotary_tables(rotary: nn.Module, like: Tensor, position_ids: Tensor, document_lengths: Tensor) -> dict[str | None, Rope]:
    """cos and sin (T, R) in `like`'s dtype per kind of layer (None where all layers share one), UNROTATED among them if there are such.

    R of a head's numbers turn. position_ids (T,): position in the document; document_lengths (T,): the whole document's tokens.
    """
    family = family_of(rotary.config.model_type)
    if family is not None and facts_of(family).wide_tables:
        like = like.new_empty(0, dtype=_wide(like))
    keys: list[str | None] = list(rotary.layer_types) if isinstance(rotary.rope_type, dict) else [None]
    tables = {key: _table(rotary, key, like, position_ids, document_lengths) for key in keys}
    if family is not None and facts_of(family).unrotated(vars(rotary.config)):
        cos, sin = tables[keys[0]]
        tables[UNROTATED] = torch.ones_like(cos), torch.zeros_like(sin)
    return tables


def _table(rotary: nn.Module, key: str | None, like: Tensor, position_ids: Tensor, document_lengths: Tensor) -> Rope:
    rope_type = rotary.rope_type if key is None else rotary.rope_type[key]
    if rope_type in BY_LENGTH:
        return _table_by_length(rotary, rope_type, key, like, position_ids, document_lengths)
    prefix = "" if key is None else f"{key}_"
    frequencies: Tensor = getattr(rotary, f"{prefix}inv_freq")
    wide = _wide(like)
    angles = position_ids.unsqueeze(-1).to(wide) * frequencies.to(like.device, wide)
    return _cos_sin(angles, getattr(rotary, f"{prefix}attention_scaling"), like)


def _table_by_length(
    rotary: nn.Module, rope_type: str, key: str | None, like: Tensor, position_ids: Tensor, document_lengths: Tensor
) -> Rope:
    config: Any = rotary.config
    layer_type = {} if key is None else {"layer_type": key}
    wide = _wide(like)
    # Of all lengths up to the original one the tables are the same; of longer ones they are too in longrope.
    block = config.rope_parameters if key is None else config.rope_parameters[key]
    original = config.max_position_embeddings if rope_type == "dynamic" else block["original_max_position_embeddings"]
    classes = document_lengths.clamp(min=original, max=original + 1 if rope_type == "longrope" else None)
    angles, factor = position_ids.new_zeros((len(position_ids), 0), dtype=wide), 1.0
    for length in torch.unique(classes).tolist() or [original]:
        inv_freq, factor = ROPE_INIT_FUNCTIONS[rope_type](config, like.device, seq_len=_seen(rope_type, length, like), **layer_type)
        part = position_ids.unsqueeze(-1).to(wide) * inv_freq.to(wide)
        angles = part if angles.shape[1] == 0 else torch.where((classes == length).unsqueeze(-1), part, angles)
    return _cos_sin(angles, factor, like)


def _wide(like: Tensor) -> torch.dtype:
    """The precision of angles: float32 as Hugging Face has it, float64 in a float64 model."""
    return torch.float64 if like.dtype == torch.float64 else torch.float32


def _cos_sin(angles: Tensor, factor: float, like: Tensor) -> Rope:
    """The tables of angles (T, R/2), the same for both halves of the R numbers of a head that turn."""
    both = torch.cat((angles, angles), -1)
    return (both.cos() * factor).to(like.dtype), (both.sin() * factor).to(like.dtype)


def _seen(rope_type: str, length: int, like: Tensor) -> Any:
    # As Hugging Face's modules pass it: a tensor makes "dynamic" compute the new base in float32.
    return torch.tensor(length, device=like.device) if rope_type == "dynamic" else length
