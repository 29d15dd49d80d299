"""What torch says of itself and of the GPUs, as one line of JSON: `python -m efflaunch.launcher.doctor.torch_probe`.

A process of its own, for an import that crashes or a driver that hangs must not end the examination.
"""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from dataclasses import dataclass
from typing import Any

from ...utils.decode import decode

LIMIT_S = 180.0
"""A first import from cold network storage takes a minute."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SeenGpu:
    """One GPU as torch can use it."""

    name: str
    capability: str
    """Compute capability, as `9.0`."""
    total_bytes: int
    free_bytes: int


@dataclass(frozen=True, kw_only=True, slots=True)
class TorchFacts:
    """What an installed torch can do here."""

    version: str
    cuda: str | None
    """CUDA that torch was built with; None for a build without."""
    nccl: str | None
    backends: list[str]
    """Back ends of torch.distributed in this build."""
    transformers: str
    gpus: list[SeenGpu]
    problem: str = ""
    """Why GPUs cannot be used, in the driver's own words."""


def ask_torch(*, limit_s: float = LIMIT_S) -> TorchFacts | str:
    """Return what torch says; where it cannot be imported or does not answer in `limit_s` seconds, why."""
    command = [sys.executable, "-m", __name__]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit_s, stdin=subprocess.DEVNULL)
    except subprocess.TimeoutExpired:
        return f"importing torch and asking for GPUs took more than {limit_s:.0f} s"
    if done.returncode:
        return _last_words(done.stderr) or f"its import ended with exit code {done.returncode}"
    return decode(TorchFacts, json.loads(done.stdout.strip().splitlines()[-1]))


def _last_words(printed: str) -> str:
    lines = [line.strip() for line in printed.splitlines() if line.strip()]
    return lines[-1][:300] if lines else ""


def probe() -> dict[str, Any]:
    """Import torch and transformers, make a context on every visible GPU, and describe them."""
    import torch
    import torch.distributed as dist

    known = [name for name in ("gloo", "nccl", "mpi", "ucc") if dist.is_available() and dist.is_backend_available(name)]
    gpus, problem = _gpus(torch)
    return {
        "version": str(torch.__version__),
        "cuda": torch.version.cuda,
        "nccl": ".".join(map(str, torch.cuda.nccl.version())) if torch.version.cuda and "nccl" in known else None,
        "backends": known,
        "transformers": str(importlib.import_module("transformers").__version__),
        "gpus": gpus,
        "problem": problem,
    }


def _gpus(torch: Any) -> tuple[list[dict[str, Any]], str]:
    if not torch.version.cuda:
        return [], ""
    gpus = []
    try:
        for index in range(torch.cuda.device_count()):
            free, total = torch.cuda.mem_get_info(index)
            capability = ".".join(map(str, torch.cuda.get_device_capability(index)))
            name = torch.cuda.get_device_name(index)
            gpus.append({"name": name, "capability": capability, "total_bytes": total, "free_bytes": free})
        torch.cuda.init()
    except Exception as error:  # a finding: whatever the driver raises is what is asked for
        return gpus, str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return gpus, ""


if __name__ == "__main__":
    print(json.dumps(probe()))
