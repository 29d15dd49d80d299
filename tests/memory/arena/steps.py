"""A small model of ours and one step of it in one process, for the arena's tests and for its benchmark's."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from efflaunch.memory.policy import MemoryPolicy

FIELDS: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 176,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
}
CHUNKED = MemoryPolicy(chunk_tokens=40)


class SmallStep:
    """Forward and backward of packed documents; the gradients are kept aside until the next step, or given up."""

    def __init__(self, policy: MemoryPolicy = CHUNKED, documents: tuple[int, ...] = (70, 50), **fields: Any) -> None:
        from efflaunch.bench.arena import OneRank

        torch.manual_seed(0)
        self.rank = OneRank({**FIELDS, **fields}, policy, dtype=torch.float32, loss_chunk_tokens=32)
        self.documents = documents

    def __call__(self) -> float:
        return self.rank.step(self.documents)

    def external(self) -> list[Tensor]:
        return list(self.rank.model.parameters())

    def gradients(self) -> list[Tensor]:
        """Of the last step, copied."""
        return [p.grad.clone() for p in self.rank.model.parameters() if p.grad is not None]
