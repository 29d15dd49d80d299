"""Detects what this machine has: cores, memory, GPUs."""

from __future__ import annotations

import os
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..cluster.config import Device
from .visible_gpus import Gpu, parse_list, visible_gpus


@dataclass(frozen=True, slots=True)
class Machine:
    """GPUs that processes here can use, cores and memory of this machine."""

    gpus: tuple[Gpu, ...]
    num_cores: int
    memory_bytes: int
    """Host memory that new processes can still have, in bytes."""


def this_machine(device: Device) -> Machine:
    """Cores, free memory and, where GPUs are asked for, GPUs."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return Machine(tuple(find_gpus()) if device is Device.CUDA else (), cores, available_memory())


def find_gpus() -> list[Gpu]:
    """GPUs that a process started here can use: those of the machine that CUDA_VISIBLE_DEVICES leaves it; none where there is no driver."""
    return visible_gpus(all_gpus(), os.environ.get("CUDA_VISIBLE_DEVICES"))


def all_gpus() -> list[Gpu]:
    """GPUs of this machine, hidden ones too, by NVML, or by nvidia-smi where its Python package is not installed."""
    try:
        import pynvml
    except ImportError:
        return _gpus_by_smi()
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return []
    handles = [pynvml.nvmlDeviceGetHandleByIndex(index) for index in range(pynvml.nvmlDeviceGetCount())]
    return [_by_nvml(pynvml, handle) for handle in handles]


def _by_nvml(pynvml: Any, handle: Any) -> Gpu:
    """One GPU, with its slices where it is in MIG mode, or a slice."""
    name, uuid = pynvml.nvmlDeviceGetName(handle), pynvml.nvmlDeviceGetUUID(handle)
    try:
        memory = pynvml.nvmlDeviceGetMemoryInfo(handle)
        total, free = int(memory.total), int(memory.free)
    except pynvml.NVMLError:  # a card that shares the host's memory, or one this user may not ask about
        total, free = 0, None
    try:
        in_mig_mode = bool(pynvml.nvmlDeviceGetMigMode(handle)[0])
    except pynvml.NVMLError:  # a GPU without MIG, or a slice
        in_mig_mode = False
    slices = []
    for index in range(pynvml.nvmlDeviceGetMaxMigDeviceCount(handle) if in_mig_mode else 0):
        try:
            slices.append(_by_nvml(pynvml, pynvml.nvmlDeviceGetMigDeviceHandleByIndex(handle, index)))
        except pynvml.NVMLError:  # no slice has this number
            continue
    return Gpu(_text(name), total, free, _text(uuid), tuple(slices), in_mig_mode)


def _text(value: str | bytes) -> str:
    """Older versions of NVML's package give bytes."""
    return value.decode() if isinstance(value, bytes) else value


def _gpus_by_smi() -> list[Gpu]:
    fields = "name,memory.total,memory.free,uuid,mig.mode.current"
    rows = [line.rsplit(",", 4) for line in _smi(f"--query-gpu={fields}", "--format=csv,noheader,nounits").splitlines() if line.strip()]
    modes = [mode.strip() == "Enabled" for *_, mode in rows]
    slices = parse_list(_smi("-L")) if any(modes) else {}
    gpus = []
    for (name, total, free, uuid, _), in_mig_mode in zip(rows, modes, strict=True):
        own = slices.get(uuid.strip(), ())
        gpus.append(Gpu(name.strip(), _mib(total) or 0, _mib(free), uuid.strip(), own, in_mig_mode))
    return gpus


def _mib(figure: str) -> int | None:
    """Bytes of a figure of nvidia-smi; None where it says `[N/A]` or why there is none."""
    try:
        return int(float(figure)) << 20
    except ValueError:
        return None


def _smi(*options: str) -> str:
    """What nvidia-smi prints; empty without a driver, without the tool, or with a tool without a driver: no GPU to use."""
    try:
        return subprocess.run(["nvidia-smi", *options], capture_output=True, text=True, timeout=30, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return ""


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
