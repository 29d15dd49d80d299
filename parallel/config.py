"""How the computation is split over ranks."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from ..units import Tokens


class SequenceMode(Enum):
    """How sequences are given to groups: `static` is one SP degree for the whole run."""

    STATIC = "static"


class Scheme(Enum):
    """Communication inside a sequence group."""

    AUTO = "auto"
    """Ulysses up to what the heads and the node allow, ring across the rest."""
    ULYSSES = "ulysses"
    RING = "ring"
    HYBRID = "hybrid"
    """Ulysses of `ulysses_degree` ranks inside x ring across."""


class GradReduce(Enum):
    """When gradients are reduced across ranks."""

    AUTO = "auto"
    """Per step where whole float32 gradients fit in memory, else per micro-batch."""
    STEP = "step"
    MICRO_BATCH = "micro_batch"


@dataclass(frozen=True, kw_only=True, slots=True)
class ParallelConfig:
    """Ranks = replicate x shard; sequence groups are laid over the same ranks."""

    name: str
    replicate: int = 1
    """Copies of the sharded model (HSDP); 1: weights are sharded over all ranks."""
    shard: int | None = None
    """Ranks that share one copy of weights and optimizer states; None: all ranks / replicate."""
    sequence: SequenceMode = SequenceMode.STATIC
    sp_degree: int | None = None
    """Ranks per sequence group, a power of two; None: the smallest that holds the longest sequence."""
    scheme: Scheme = Scheme.AUTO
    ulysses_degree: int | None = None
    """hybrid only: ranks of the inner Ulysses exchange."""
    tokens_per_rank: Tokens
    """Most tokens one rank holds in a micro-batch."""
    grad_reduce: GradReduce = GradReduce.AUTO
