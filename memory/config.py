"""What is kept, moved and recomputed, as a person asks for it; memory/policy.py says what that means."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import ClassVar

from ..errors import ConfigError
from ..units import Bytes, Tokens
from ..utils.ranges import BYTES, TOKENS, Range, check_ranges


class ActivationPlace(Enum):
    """Where a class of activations waits between forward and backward."""

    KEEP = "keep"
    """Stays on the device."""
    HOST = "host"
    """Waits in host memory (or in files under memory.offload_dir), copied there and back while the device computes."""
    RECOMPUTE = "recompute"
    """Nowhere: it is recomputed."""


class AttentionTiling(Enum):
    """What one piece of attention is."""

    WHOLE = "whole"
    """All tokens of the rank at once; only norms, projections and MLP go by chunks."""
    CHUNKS = "chunks"
    """One chunk of queries at a time, in backward the last one first: full length only for keys, values and their gradients."""


class Arena(Enum):
    """How device memory is handed out."""

    DEFAULT = "default"
    """The allocator of torch; on CUDA with expandable segments."""
    PLANNED = "planned"
    """Addresses planned from a traced step, every request checked against the plan."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MemoryConfig:
    """One policy for every decoder layer. With `solve`, what is null is solved to the budget; what is given is held fixed."""

    name: str
    solve: bool = False
    """Choose every null field below so that the step fits the device and the host in the least time (estimate/solver/solve.py)."""
    layer_input: ActivationPlace | None = None
    """keep or host."""
    attention_output: ActivationPlace | None = None
    """Attention output and log-sum-exp. recompute: attention is recomputed in backward."""
    activations: ActivationPlace | None = None
    """Everything else inside the layer: queries, keys and values, the sum after attention, gate and up."""
    host_fraction: float | None = None
    """With activations=host: the share of tokens whose activations go to the host; those of the others are recomputed. null: all."""
    segment_layers: int | None = None
    """Only every so many layers' input is kept; the others are recomputed inside their segment. null: 1."""
    chunk_tokens: Tokens | None = None
    """Norms, projections and MLP run over this many tokens at a time, in both passes. null: all at once."""
    attention: AttentionTiling | None = None
    """null: whole."""
    head_groups: int | None = None
    """Attention walks over the heads in so many groups (fewer where heads do not divide), one group's queries, keys and values
    at a time. null: 1."""
    host_budget: Bytes | None = None
    """Host memory of one node that activations and optimizer states may take. null: what the ledger leaves of cluster.host_memory_bytes."""
    offload_dir: str | None = None
    """A directory on a local disk that takes what goes to the host; null: host memory."""
    compile: bool = False
    """Run norms, projections and MLP through torch.compile, one graph for all layers that are built alike. Gradients change by
    rounding only; the first step takes longer. Off, for it has not been run on a GPU yet."""
    arena: Arena = Arena.DEFAULT

    RANGES: ClassVar[Mapping[str, Range]] = {
        "host_fraction": Range(0.0, 1.0),
        "segment_layers": Range(1, 10_000),
        "chunk_tokens": Range(1, TOKENS),
        "head_groups": Range(1, 65_536),
        "host_budget": Range(0, BYTES),
    }


def check_memory(memory: MemoryConfig) -> None:
    """ConfigError for values that are out of range and combinations that save nothing or mean nothing."""
    check_ranges(memory, "memory")
    _check_layer_input(memory)
    if not memory.solve:
        _check_given(memory)
    kept = memory.activations is ActivationPlace.KEEP
    if kept and memory.attention_output is ActivationPlace.RECOMPUTE:
        raise ConfigError(
            "memory.attention_output",
            found="recompute with memory.activations=keep",
            expected="attention kept where everything else is: it is the costly part",
            hint="memory=keep, or memory=recompute",
        )
    if kept and memory.chunk_tokens is not None:
        raise ConfigError(
            "memory.chunk_tokens",
            found=f"{memory.chunk_tokens} with memory.activations=keep",
            expected="null: chunks save memory only where activations are recomputed",
            hint="memory=recompute, or memory.chunk_tokens=null",
        )
    _check_walk(memory)
    if memory.compile and memory.arena is Arena.PLANNED:
        raise ConfigError(
            "memory.compile",
            found="true with memory.arena=planned",
            expected="one of them: the arena's plan is traced from a step that runs operation by operation",
            hint="memory.compile=false, or memory.arena=default",
        )
    if memory.host_fraction is not None and memory.activations is not ActivationPlace.HOST:
        raise ConfigError(
            "memory.host_fraction",
            found=f"{memory.host_fraction:g} with memory.activations={'null' if memory.activations is None else memory.activations.value}",
            expected="null: it is the share of activations=host",
            hint="memory.activations=host, or memory.host_fraction=null",
        )


def _check_layer_input(memory: MemoryConfig) -> None:
    if memory.layer_input is ActivationPlace.RECOMPUTE:
        raise ConfigError(
            "memory.layer_input",
            found="recompute",
            expected="keep or host: something has to be left to start from",
            hint="memory.layer_input=keep, or memory.layer_input=keep memory.segment_layers=2 for every second one only",
        )


def _check_given(memory: MemoryConfig) -> None:
    for key in ("layer_input", "attention_output", "activations"):
        if getattr(memory, key) is None:
            raise ConfigError(
                f"memory.{key}", found="null without memory.solve", expected="where it is kept", hint=f"memory.{key}=keep, or memory=auto"
            )


def _check_walk(memory: MemoryConfig) -> None:
    chunks = memory.attention is AttentionTiling.CHUNKS
    if chunks and memory.chunk_tokens is None and not memory.solve:
        raise ConfigError(
            "memory.attention",
            found="chunks with memory.chunk_tokens=null",
            expected="the size of a chunk",
            hint="memory.chunk_tokens=16K, or memory.attention=whole",
        )
    if chunks and (memory.head_groups or 1) > 1:
        raise ConfigError(
            "memory.head_groups",
            found=f"{memory.head_groups} with memory.attention=chunks",
            expected="1: attention goes by chunks of queries or by groups of heads, not both",
            hint="memory.head_groups=1, or memory.attention=whole",
        )
    if memory.activations is ActivationPlace.KEEP and ((memory.head_groups or 1) > 1 or (memory.segment_layers or 1) > 1):
        key = "head_groups" if (memory.head_groups or 1) > 1 else "segment_layers"
        raise ConfigError(
            f"memory.{key}",
            found=f"{getattr(memory, key)} with memory.activations=keep",
            expected="1: it saves memory only where activations are recomputed or moved",
            hint=f"memory=recompute, or memory.{key}=1",
        )
