"""Detects what this machine has: cores, memory, GPUs."""

from __future__ import annotations

import os
import subprocess
from dataclasses import dataclass
from pathlib import Path

from ..cluster.config import Device


@dataclass(frozen=True, slots=True)
class Gpu:
    name: str
    memory_bytes: int
    free_bytes: int | None = None
    """Bytes not in use by any process; None where unknown."""


@dataclass(frozen=True, slots=True)
class Machine:
    """GPUs, cores and memory of this machine."""

    gpus: tuple[Gpu, ...]
    num_cores: int
    memory_bytes: int
    """Host memory that new processes can still have, in bytes."""


def this_machine(device: Device) -> Machine:
    """Cores, free memory and, where GPUs are asked for, GPUs."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return Machine(tuple(find_gpus()) if device is Device.CUDA else (), cores, available_memory())


def find_gpus() -> list[Gpu]:
    """GPUs of this machine by NVML, or by nvidia-smi where its Python package is not installed; none where there is no driver."""
    try:
        import pynvml
    except ImportError:
        return _gpus_by_smi()
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return []
    handles = [pynvml.nvmlDeviceGetHandleByIndex(index) for index in range(pynvml.nvmlDeviceGetCount())]
    memories = [pynvml.nvmlDeviceGetMemoryInfo(handle) for handle in handles]
    names = [str(pynvml.nvmlDeviceGetName(handle)) for handle in handles]
    return [Gpu(name, int(memory.total), int(memory.free)) for name, memory in zip(names, memories, strict=True)]


def _gpus_by_smi() -> list[Gpu]:
    query = ["nvidia-smi", "--query-gpu=name,memory.total,memory.free", "--format=csv,noheader,nounits"]
    try:
        output = subprocess.run(query, capture_output=True, text=True, timeout=30, check=True).stdout
    except (OSError, subprocess.SubprocessError):  # no driver, no tool or a tool without a driver: no GPU to use
        return []
    rows = [line.rsplit(",", 2) for line in output.splitlines() if line.strip()]
    return [Gpu(name.strip(), int(float(total)) << 20, int(float(free)) << 20) for name, total, free in rows]


def available_memory() -> int:
    """Bytes new processes can have: the kernel's estimate, less where a control group allows less."""
    meminfo = Path("/proc/meminfo")
    if not meminfo.exists():
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    fields = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
    available = int(fields["MemAvailable"].split()[0]) << 10
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    if limit.exists() and used.exists() and limit.read_text().strip() != "max":
        available = min(available, int(limit.read_text()) - int(used.read_text()))
    return available
