"""What one node must hold besides its devices: processes, staging, activations and optimizer states that wait there. Pure."""

from __future__ import annotations

from ...checkpoint.sizes import replica_bytes, snapshot_pool_bytes
from ...memory.activation_classes import activation_classes
from ...memory.ranges import group_ranges
from ..plan_inputs import GIB, PlanInputs
from .activations import class_layers, moved_by_class
from .optimizer import host_optimizer_bytes, moment_numbers
from .term import KEEPING, Term, term


def host_terms(inputs: PlanInputs, device_peak_bytes: int) -> tuple[Term, ...]:
    """Terms of one node's host memory; those of no bytes are left out. On a machine without GPUs the ranks' own memory is the node's."""
    ranks = inputs.layout.ranks_per_node
    made = (
        _processes(inputs, ranks, device_peak_bytes),
        moved_activations(inputs),
        term("optimizer states on the host", f"{ranks} ranks", ranks * host_optimizer_bytes(inputs)),
        term("data staging", f"ids and targets of four micro-batches, {ranks} ranks", ranks * 4 * 24 * inputs.tokens),
        term("system", "operating system and page cache it cannot do without (assumed)", 4 * GIB if inputs.on_gpu else GIB),
        replicas(inputs),
    )
    left = inputs.cluster.host_memory_bytes - sum(entry.num_bytes for entry in made)
    return tuple(entry for entry in (*made, snapshot(inputs, max(0, left) // ranks)) if entry.num_bytes)


def moved_activations(inputs: PlanInputs) -> Term:
    """Rows that wait in host memory for their layer's backward, in whole blocks of the arena."""
    ranks = inputs.layout.ranks_per_node
    names = ", ".join(name.replace("_", " ") for name, num_bytes in moved_by_class(inputs).items() if num_bytes)
    num_bytes = 0 if inputs.policy.offload_dir else ranks * arena_bytes(inputs)
    return term("activations on the host", f"{names} of {ranks} ranks", num_bytes, KEEPING)


def moved_bytes(inputs: PlanInputs) -> int:
    """Activations of one rank that wait on its host or in files, as they are used."""
    return sum(moved_by_class(inputs).values())


def file_bytes(inputs: PlanInputs) -> int:
    """Bytes of one node's files under memory.offload_dir."""
    return inputs.layout.ranks_per_node * moved_bytes(inputs) if inputs.policy.offload_dir else 0


ARENA_BLOCK_BYTES = 64 << 10
"""What the arena hands out at least (memory/offload/host_pool.py)."""


def arena_bytes(inputs: PlanInputs) -> int:
    """What the arena of one rank is opened with: the rows that wait there, each tensor of each piece in whole blocks."""
    moved = moved_by_class(inputs)
    if not any(moved.values()):
        return 0
    pieces = len(group_ranges((inputs.tokens,), inputs.policy))
    layers = class_layers(inputs)
    parcels = sum(
        layers[kind.name] * kind.num_tensors * (inputs.policy.head_groups if kind.of_heads else 1)
        for kind in activation_classes(inputs.spec)
        if moved[kind.name]
    )
    return sum(moved.values()) + pieces * parcels * ARENA_BLOCK_BYTES


def snapshot(inputs: PlanInputs, free_bytes: int) -> Term:
    """A rank's weights and moments while a checkpoint is written, or half of what is free for it where that is less."""
    ranks, state, asked = inputs.layout.ranks_per_node, state_bytes(inputs), inputs.residency.snapshot_bytes
    pool = snapshot_pool_bytes(state, asked, free_bytes=free_bytes)
    note = "checkpoint.pool_bytes" if asked is not None else "weights and moments" if pool >= state else "half of what is free"
    return term("checkpoint snapshots", f"{note}, while files are written; {ranks} ranks", ranks * pool)


def state_bytes(inputs: PlanInputs) -> int:
    """One rank's trained weights and their moments, as checkpoints hold them."""
    return int(inputs.master * (inputs.trained_parameters + moment_numbers(inputs))) // inputs.layout.shard


def replicas(inputs: PlanInputs) -> Term:
    """Images of ranks in keepers' memory (checkpoint.replica)."""
    ranks, nodes = inputs.layout.ranks_per_node, inputs.cluster.num_nodes
    num_bytes = replica_bytes(state_bytes(inputs), ranks, several_nodes=nodes > 1) if inputs.residency.replicas else 0
    which = "those of this node's ranks and of another's" if nodes > 1 else "those of this node's ranks"
    return term("checkpoint replicas", f"{which}, two of each", num_bytes)


def _processes(inputs: PlanInputs, ranks: int, device_peak_bytes: int) -> Term:
    if not inputs.on_gpu:
        return term("ranks", f"{ranks} ranks at their peak", ranks * device_peak_bytes)
    return term("processes", f"{ranks} ranks with torch and CUDA, 4 GiB each (assumed)", ranks * 4 * GIB)
