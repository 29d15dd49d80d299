"""Collects what a checkpoint records about its origin, and what this machine has."""

from __future__ import annotations

import hashlib
import json
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from torch import Tensor

_PACKAGES = ("efflaunch", "torch", "transformers", "numpy", "safetensors")


def weights_hash(model: dict[str, Tensor]) -> str:
    """A hash of the weights' names, shapes and dtypes."""
    shapes = [[key, list(value.shape), str(value.dtype)] for key, value in model.items()]
    return hashlib.sha256(json.dumps(shapes).encode()).hexdigest()


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide what a step computes."""
    return {"python": platform.python_version(), **{name: _version(name) for name in _PACKAGES}}


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def free_memory(meminfo: Path = Path("/proc/meminfo"), cgroup: Path = Path("/sys/fs/cgroup")) -> int:
    """Host bytes that can be had without swapping, of the machine or of the container we are in."""
    lines = dict(line.split(":", 1) for line in meminfo.read_text().splitlines() if ":" in line)
    free = int(lines["MemAvailable"].split()[0]) * 1024
    limit, used = cgroup / "memory.max", cgroup / "memory.current"
    if limit.exists() and used.exists() and (text := limit.read_text().strip()) != "max":
        free = min(free, max(0, int(text) - int(used.read_text())))
    return free
