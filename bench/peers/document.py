"""One document on one rank: its rows, its attention and its mean loss, without process groups."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...model.chunked_loss import IGNORE, cross_entropy
from ...model.stage import Tokens
from ...parallel.sequence.clock import BusyClock
from ...parallel.sequence.kernels import block_kernel
from ...parallel.sequence.layout import group_layout
from ...parallel.sequence.plan import Group
from ...parallel.sequence.runtime import SequenceAttention, sequence_attention
from ...parallel.topology import Topology


def one_document(ids: Tensor) -> Tokens:
    """The rows of a document of `ids` (T,)."""
    targets = torch.cat([ids[1:], ids.new_tensor([IGNORE])])
    return Tokens(ids, targets, torch.arange(len(ids), device=ids.device), torch.full_like(ids, len(ids)))


def alone(num_tokens: int, device: torch.device) -> SequenceAttention:
    """The attention of one document on one rank."""
    topology = Topology(0, 1, device.type, None, None, None)  # type: ignore[arg-type]
    layout = group_layout((num_tokens,), ulysses=1, ring=1)
    return sequence_attention(topology, block_kernel(device), Group(0, 1, 1, (0,)), layout, BusyClock(device))


def mean_loss(model: Any, ids: Tensor, runtime: SequenceAttention) -> Tensor:
    """Compute the mean loss of a model with our forward on a document of `ids`, whose last token has no target."""
    scale = 1.0 / (len(ids) - 1)
    loss: Tensor = model(one_document(ids), runtime, lambda head: cross_entropy(head, scale))
    return loss
