"""What is kept, moved and recomputed."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from ..errors import ConfigError
from ..units import Tokens


class Keep(Enum):
    """What happens to one class of activations between forward and backward."""

    KEEP = "keep"
    RECOMPUTE = "recompute"


@dataclass(frozen=True, kw_only=True, slots=True)
class MemoryConfig:
    """One policy for every decoder layer; the layer input itself is always kept."""

    name: str
    attention_output: Keep
    """Attention output and log-sum-exp: kept, or attention runs again in backward."""
    activations: Keep
    """Everything else inside the layer."""
    chunk_tokens: Tokens | None = None
    """Recomputing only: norms, projections and MLP run over this many tokens at a time, in both passes. None: all at once."""


def check_memory(memory: MemoryConfig) -> None:
    """ConfigError for combinations that save nothing or mean nothing."""
    if memory.activations is Keep.KEEP and memory.attention_output is Keep.RECOMPUTE:
        raise ConfigError(
            "memory.attention_output",
            found="recompute with memory.activations=keep",
            expected="attention kept where everything else is: it is the costly part",
            hint="memory=keep, or memory=recompute",
        )
    if memory.chunk_tokens is not None and memory.chunk_tokens < 1:
        raise ConfigError(
            "memory.chunk_tokens", found=str(memory.chunk_tokens), expected="1 or more, or null", hint="memory.chunk_tokens=16K"
        )
    if memory.chunk_tokens is not None and memory.activations is Keep.KEEP:
        raise ConfigError(
            "memory.chunk_tokens",
            found=f"{memory.chunk_tokens} with memory.activations=keep",
            expected="null: chunks save memory only where activations are recomputed",
            hint="memory=recompute, or memory.chunk_tokens=null",
        )
