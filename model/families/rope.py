"""Rotary tables for packed documents. Every scaling variant is Hugging Face's own; nothing here depends on the plan."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from .adapter import Rope


def rotary_tables(rotary: nn.Module, like: Tensor, position_ids: Tensor, document_lengths: Tensor) -> dict[str | None, Rope]:
    """cos and sin (T, D) in `like`'s dtype per kind of layer (None where all layers share one).

    position_ids (T,): position in the document; document_lengths (T,): the whole document's tokens. "dynamic" scaling
    depends on the length seen: here always the document's own, as if it had been run alone, whichever rank holds it.
    """
    keys: list[str | None] = list(rotary.layer_types) if isinstance(rotary.rope_type, dict) else [None]
    return {key: _table(rotary, key, like, position_ids, document_lengths) for key in keys}


def _table(rotary: nn.Module, key: str | None, like: Tensor, position_ids: Tensor, document_lengths: Tensor) -> Rope:
    rope_type = rotary.rope_type if key is None else rotary.rope_type[key]
    if "dynamic" in rope_type:
        return _dynamic_table(rotary, key, like, position_ids, document_lengths)
    layer_type = {} if key is None else {"layer_type": key}
    cos, sin = rotary(like, position_ids.unsqueeze(0), **layer_type)
    return cos[0], sin[0]


def _dynamic_table(rotary: nn.Module, key: str | None, like: Tensor, position_ids: Tensor, document_lengths: Tensor) -> Rope:
    config = rotary.config
    wide = torch.float64 if like.dtype == torch.float64 else torch.float32
    angles = position_ids.new_zeros((len(position_ids), 0), dtype=wide)
    for length in torch.unique(document_lengths.clamp(min=config.max_position_embeddings)).tolist() or [config.max_position_embeddings]:
        init = ROPE_INIT_FUNCTIONS["dynamic"]
        inv_freq, _ = init(
            config, like.device, seq_len=torch.tensor(length, device=like.device), **({} if key is None else {"layer_type": key})
        )
        part = position_ids.unsqueeze(-1).to(wide) * inv_freq.to(wide)
        rows = (document_lengths.clamp(min=config.max_position_embeddings) == length).unsqueeze(-1)
        angles = part if angles.shape[1] == 0 else torch.where(rows, part, angles)
    both = torch.cat((angles, angles), -1)
    return both.cos().to(like.dtype), both.sin().to(like.dtype)
