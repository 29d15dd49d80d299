"""Settings of the model: family, sizes, where its weights come from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, ClassVar

from ..units import Tokens
from ..utils.ranges import TOKENS, Range


class Family(Enum):
    """Model families with a layer adapter (`model/families/`)."""

    LLAMA = "llama"
    MISTRAL = "mistral"
    QWEN2 = "qwen2"
    QWEN3 = "qwen3"
    GEMMA2 = "gemma2"
    GEMMA3 = "gemma3"
    GPT_OSS = "gpt_oss"
    MIXTRAL = "mixtral"
    QWEN2_MOE = "qwen2_moe"
    QWEN3_MOE = "qwen3_moe"
    DOTS1 = "dots1"
    SMOLLM3 = "smollm3"
    OLMO2 = "olmo2"
    OLMO3 = "olmo3"
    PHI3 = "phi3"
    GRANITE = "granite"
    GLM4 = "glm4"
    COHERE2 = "cohere2"
    MINISTRAL = "ministral"
    STABLELM = "stablelm"


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """Architecture and weights. With `path`, every size comes from its config.json and must not be given here."""

    name: str
    """Shown in logs and plans."""
    path: str | None = None
    """A local directory of safetensors, or a hub name where there is a network; None: random weights."""
    family: Family | None = None
    num_layers: int | None = None
    hidden_size: int | None = None
    intermediate_size: int | None = None
    num_heads: int | None = None
    num_kv_heads: int | None = None
    head_dim: int | None = None
    """None: hidden_size / num_heads."""
    vocab_size: int | None = None
    max_positions: Tokens | None = None
    """Context length the rotary table is defined for (`max_position_embeddings`)."""
    rope_theta: float | None = None
    rope_scaling: dict[str, Any] | None = None
    """Scaling as Hugging Face defines it: rope_type linear, dynamic, yarn or llama3, with its parameters."""
    sliding_window: Tokens | None = None
    tie_embeddings: bool | None = None
    """Whether the head is the embedding; None: not, from scratch. With `path` config.json says it, or `extra.tie_word_embeddings`."""
    extra: dict[str, Any] = field(default_factory=dict)
    """Further fields of the Hugging Face config of this family, passed on as they are."""

    RANGES: ClassVar[Mapping[str, Range]] = {
        "num_layers": Range(1, 1000),
        "hidden_size": Range(1, 1 << 20),
        "intermediate_size": Range(1, 1 << 24),
        "num_heads": Range(1, 65_536),
        "num_kv_heads": Range(1, 65_536),
        "head_dim": Range(1, 65_536),
        "vocab_size": Range(1, 1 << 28),
        "max_positions": Range(1, TOKENS),
        "rope_theta": Range(0, 1e15, above=True),
        "sliding_window": Range(1, TOKENS),
    }
