"""Is there the memory and the disk that a policy moves activations to? Asked before anything is pinned or allocated.

The launcher asks too, before it starts ranks: torch comes with the modules imported late.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from ...errors import ConfigError
from ...units import format_bytes

KEY = "memory.offload_dir"
CGROUPS = Path("/sys/fs/cgroup")


@dataclass(frozen=True, slots=True)
class FreeMemory:
    """Memory that this process and its siblings may still take, and what limits it."""

    num_bytes: int
    limited_by: str


def check_offload_space(bytes_per_rank: int, ranks_on_node: int, offload_dir: str | None) -> None:
    """ConfigError if the ranks of this node together cannot move so much. Call it before any of them opens its store."""
    if offload_dir is None:
        check_host_memory(bytes_per_rank, ranks_on_node)
    else:
        from .staging import staging_bytes_for

        check_offload_dir(offload_dir, bytes_per_rank, ranks_on_node)
        check_host_memory(staging_bytes_for(bytes_per_rank), ranks_on_node)


def check_host_memory(bytes_per_rank: int, ranks_on_node: int, free: FreeMemory | None = None) -> None:
    """ConfigError if the ranks of this node together want more than is free. Call it before any of them opens its store."""
    if free is None:
        free = free_memory()
    needed = bytes_per_rank * ranks_on_node
    if needed > free.num_bytes:
        raise ConfigError(
            "memory.host_budget",
            found=f"{format_bytes(free.num_bytes)} of host memory free on this node ({free.limited_by})",
            expected=f"{format_bytes(needed)} for what {ranks_on_node} rank{'s' * (ranks_on_node != 1)} move there, "
            f"{format_bytes(bytes_per_rank)} each",
            hint=f"memory.host_budget={free.num_bytes >> 20}MiB, memory.segment_layers=2, "
            f"or {KEY}=DIRECTORY on a local disk; under Slurm, more --mem",
        )


def free_memory(proc: Path = Path("/proc/self"), cgroups: Path = CGROUPS) -> FreeMemory:
    """The least of what the machine has available and what each control group above this process leaves (v1 and v2).

    Page cache that a group can drop counts as free, as the kernel drops it before it kills.
    """
    import psutil

    limits = [FreeMemory(int(psutil.virtual_memory().available), "available on the machine")]
    for line in (proc / "cgroup").read_text().splitlines() if (proc / "cgroup").exists() else []:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            roots = [cgroups, cgroups / "unified"]
            limits += [free for root in roots for free in _limits(root, path, "memory.max", "memory.current", "inactive_file")]
        elif "memory" in controllers.split(","):
            root = cgroups / "memory"
            limits += _limits(root, path, "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
    return min(limits, key=lambda free: free.num_bytes)


def _limits(root: Path, path: str, limit_name: str, usage_name: str, cache_name: str) -> list[FreeMemory]:
    """Limits of the group at `path` and of those above it; a container may see its own group as the root."""
    group, limits = root / path.lstrip("/"), []
    for folder in [group, *group.parents]:
        limit = _read(folder / limit_name)
        if limit is not None and folder.is_relative_to(root) and limit.isdigit():
            stat = dict(line.split() for line in (_read(folder / "memory.stat") or "").splitlines())
            used = int(_read(folder / usage_name) or 0) - int(stat.get(cache_name, 0))
            limits.append(FreeMemory(max(0, int(limit) - max(0, used)), f"limit of the control group {folder}"))
    return limits


def _read(path: Path) -> str | None:
    return path.read_text().strip() if path.is_file() else None


def check_offload_dir(directory: str, bytes_per_rank: int, ranks_on_node: int) -> None:
    """ConfigError if the directory is none, cannot be written, or has not the room for all ranks of this node."""
    path = Path(directory)
    try:
        stat = os.statvfs(path)
        if not path.is_dir():
            raise NotADirectoryError(0, "a file, not a directory")
        if not os.access(path, os.W_OK | os.X_OK):
            raise PermissionError(0, "permission denied")
    except OSError as error:
        from .file_blocks import unusable

        raise unusable(path, error) from error
    if stat.f_bavail * stat.f_frsize < bytes_per_rank * ranks_on_node:
        from .file_blocks import full

        raise full(path, bytes_per_rank * ranks_on_node)
