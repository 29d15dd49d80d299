"""Llama-3-8B's layer in other widths with its true ratios; the contestants of bench/memory.py are built from it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Shape:
    """Hidden = heads x head_dim; 1 key/value head for 4 heads, intermediate 3.5 x hidden, vocabulary 31.3125 x hidden, untied."""

    num_heads: int
    head_dim: int

    @property
    def hidden_size(self) -> int:
        return self.num_heads * self.head_dim

    @property
    def vocab_size(self) -> int:
        return self.hidden_size * 501 // 16

    def fields(self, num_layers: int) -> dict[str, Any]:
        """The Hugging Face fields of a model with so many layers."""
        if self.num_heads % 4 or self.hidden_size % 16:
            raise ValueError(f"{self} cannot have Llama-8B's ratios: heads must be a multiple of 4, hidden of 16")
        return {
            "model_type": "llama",
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.hidden_size * 7 // 2,
            "num_hidden_layers": num_layers,
            "num_attention_heads": self.num_heads,
            "num_key_value_heads": self.num_heads // 4,
            "head_dim": self.head_dim,
            "max_position_embeddings": 131072,
            "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
            "tie_word_embeddings": False,
            "use_cache": False,
        }


LLAMA_8B = Shape(num_heads=32, head_dim=128)
LLAMA_8B_LAYERS = 32


@dataclass(frozen=True, slots=True)
class Chunks:
    """Tokens worked on at a time: `layer` in our executor, `loss` in chunked losses; StreamBP's own two sizes."""

    layer: int
    loss: int
    streambp_layer: int
    streambp_loss: int


@dataclass(frozen=True, slots=True)
class Task:
    """One model and one sequence: every contestant makes the same gradients of the same mean loss."""

    shape: Shape
    num_layers: int
    num_tokens: int
    chunks: Chunks
    dtype: str = "bfloat16"
    seed: int = 0
