"""What one node must hold besides its devices: processes, staging, activations and optimizer states that wait there. Pure."""

from __future__ import annotations

from ..checkpoint.sizes import replica_bytes, snapshot_pool_bytes
from .activation_classes import activation_classes
from .ranges import group_ranges
from .setting import GIB, KEEPING, Setting, Term, term
from .terms_activations import class_layers, moved_by_class
from .terms_optimizer import host_optimizer_bytes


def host_terms(s: Setting, device_peak_bytes: int) -> tuple[Term, ...]:
    """Of one node; terms of no bytes left out. On a machine without GPUs the ranks' own memory is the node's."""
    ranks = s.layout.ranks_per_node
    made = (
        _processes(s, ranks, device_peak_bytes),
        moved_activations(s),
        term("optimizer states on the host", f"{ranks} ranks", ranks * host_optimizer_bytes(s)),
        term("data staging", f"ids and targets of four micro-batches, {ranks} ranks", ranks * 4 * 24 * s.tokens),
        term("system", "operating system and page cache it cannot do without (assumed)", 4 * GIB if s.on_gpu else GIB),
        replicas(s),
    )
    left = s.cluster.host_memory_bytes - sum(entry.num_bytes for entry in made)
    return tuple(entry for entry in (*made, snapshot(s, max(0, left) // ranks)) if entry.num_bytes)


def moved_activations(s: Setting) -> Term:
    """Rows that wait in host memory for their layer's backward, in whole blocks of the arena."""
    ranks = s.layout.ranks_per_node
    names = ", ".join(name.replace("_", " ") for name, num_bytes in moved_by_class(s).items() if num_bytes)
    held = 0 if s.policy.offload_dir else ranks * arena_bytes(s)
    return term("activations on the host", f"{names} of {ranks} ranks", held, KEEPING)


def moved_bytes(s: Setting) -> int:
    """Activations of one rank that wait on its host or in files, as they are used."""
    return sum(moved_by_class(s).values())


def file_bytes(s: Setting) -> int:
    """Of one node, under memory.offload_dir."""
    return s.layout.ranks_per_node * moved_bytes(s) if s.policy.offload_dir else 0


MOMENTS = 2
"""AdamW's, of each weight."""
ARENA_BLOCK_BYTES = 64 << 10
"""What the arena hands out at least (memory/offload/arena.py)."""


def arena_bytes(s: Setting) -> int:
    """What the arena of one rank is opened with: the rows that wait there, each tensor of each piece in whole blocks."""
    moved = moved_by_class(s)
    if not any(moved.values()):
        return 0
    pieces = len(group_ranges((s.tokens,), s.policy))
    layers = class_layers(s)
    parcels = sum(
        layers[kind.name] * kind.num_tensors * (s.policy.head_groups if kind.of_heads else 1)
        for kind in activation_classes(s.spec)
        if moved[kind.name]
    )
    return sum(moved.values()) + pieces * parcels * ARENA_BLOCK_BYTES


def snapshot(s: Setting, free_bytes: int) -> Term:
    """A rank's weights and moments while a checkpoint is written, or half of what is free for it where that is less."""
    ranks, state, asked = s.layout.ranks_per_node, state_bytes(s), s.residency.snapshot_bytes
    pool = snapshot_pool_bytes(state, asked, free_bytes=free_bytes)
    note = "checkpoint.pool_bytes" if asked is not None else "weights and moments" if pool >= state else "half of what is free"
    return term("checkpoint snapshots", f"{note}, while files are written; {ranks} ranks", ranks * pool)


def state_bytes(s: Setting) -> int:
    """One rank's weights and moments, as checkpoints hold them."""
    return s.parameters * s.master * (1 + MOMENTS) // s.layout.shard


def replicas(s: Setting) -> Term:
    """Images of ranks in keepers' memory (checkpoint.replica)."""
    ranks, nodes = s.layout.ranks_per_node, s.cluster.num_nodes
    held = replica_bytes(state_bytes(s), ranks, several_nodes=nodes > 1) if s.residency.replicas else 0
    which = "those of this node's ranks and of another's" if nodes > 1 else "those of this node's ranks"
    return term("checkpoint replicas", f"{which}, two of each", held)


def _processes(s: Setting, ranks: int, device_peak_bytes: int) -> Term:
    if not s.on_gpu:
        return term("ranks", f"{ranks} ranks at their peak", ranks * device_peak_bytes)
    return term("processes", f"{ranks} ranks with torch and CUDA, 4 GiB each (assumed)", ranks * 4 * GIB)
