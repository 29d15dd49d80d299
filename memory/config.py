"""What is kept, moved and recomputed."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

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
