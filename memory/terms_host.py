"""What one node must hold besides its devices: processes, staging, activations and optimizer states that wait there. Pure."""

from __future__ import annotations

from .setting import GIB, KEEPING, Setting, Term, term
from .terms_activations import moved_by_class
from .terms_optimizer import host_optimizer_bytes


def host_terms(s: Setting, device_peak_bytes: int) -> tuple[Term, ...]:
    """Of one node; terms of no bytes left out. On a machine without GPUs the ranks' own memory is the node's."""
    ranks = s.layout.ranks_per_node
    made = (
        _processes(s, ranks, device_peak_bytes),
        moved_activations(s),
        term("optimizer states on the host", f"{ranks} ranks", ranks * host_optimizer_bytes(s)),
        term("data staging", f"ids and targets of four micro-batches, {ranks} ranks", ranks * 4 * 24 * s.tokens),
        snapshot(s),
        term("system", "operating system and page cache it cannot do without (assumed)", 4 * GIB if s.on_gpu else GIB),
    )
    return tuple(entry for entry in made if entry.num_bytes)


def moved_activations(s: Setting) -> Term:
    """Rows that wait in host memory for their layer's backward, in whole blocks of the arena."""
    ranks = s.layout.ranks_per_node
    classes = {name: num_bytes for name, num_bytes in moved_by_class(s).items() if num_bytes}
    names = ", ".join(name.replace("_", " ") for name in classes)
    held = 0 if s.policy.offload_dir else ranks * sum(arena_bytes(num_bytes) for num_bytes in classes.values())
    return term("activations on the host", f"{names} of {ranks} ranks", held, KEEPING)


def moved_bytes(s: Setting) -> int:
    """Activations of one rank that wait on its host or in files, as they are used."""
    return sum(moved_by_class(s).values())


def file_bytes(s: Setting) -> int:
    """Of one node, under memory.offload_dir."""
    return s.layout.ranks_per_node * moved_bytes(s) if s.policy.offload_dir else 0


def arena_bytes(num_bytes: int) -> int:
    """What the pinned arena (memory/offload) takes for so many bytes of rows."""
    return num_bytes


def snapshot(s: Setting) -> Term:
    """What a checkpoint holds in host memory while it is written."""
    ranks = s.layout.ranks_per_node
    return term("checkpoint staging", f"64 MiB of buffers a rank while files are written, {ranks} ranks (assumed)", ranks * (64 << 20))


def _processes(s: Setting, ranks: int, device_peak_bytes: int) -> Term:
    if not s.on_gpu:
        return term("ranks", f"{ranks} ranks at their peak", ranks * device_peak_bytes)
    return term("processes", f"{ranks} ranks with torch and CUDA, 4 GiB each (assumed)", ranks * 4 * GIB)
