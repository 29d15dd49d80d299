"""What a checkpoint says about where it comes from, and what this machine has."""

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
    """Of Python and of the packages that decide what a step computes."""
    return {"python": platform.python_version(), **{name: _version(name) for name in _PACKAGES}}


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def free_memory() -> int:
    """Host bytes that can be had without swapping."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    raise OSError("/proc/meminfo does not say how much memory is available")
