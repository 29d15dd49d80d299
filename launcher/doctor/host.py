"""Looks at this machine: cores, memory, limits of processes, clock, network, compiler, GPUs."""

from __future__ import annotations

import ctypes
import os
import resource
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import psutil

from ...units import format_bytes
from ...utils.compilers import PACKAGE, compiler_path
from ..hardware import Machine
from ..visible_gpus import Gpu
from .finding import Finding, State
from .torch_probe import TorchFacts

TOPIC = "machine"
LEAST_FILES = 4096
"""Files a rank opens: communicators, shards of a corpus, checkpoints, logs."""
LEAST_SHARED = 1 << 30
"""Bytes of /dev/shm that NCCL and data workers want on a node with GPUs."""
LEAST_HOST = 4 << 30
"""Bytes of host memory below which four small ranks do not start."""
_IN_USE = 0.9
"""A GPU with less of its memory free has a process on it."""
_UNSYNCHRONISED = 0x0040
"""STA_UNSYNC of adjtimex(2)."""


def host(machine: Machine) -> list[Finding]:
    """Judge cores, memory, limits, clock, network and compiler."""
    return [_cores(machine), _memory(machine), *_limits(bool(machine.gpus)), _clock(), _network(), _compiler()]


def _finding(name: str, state: State, found: str, hint: str = "") -> Finding:
    return Finding(topic=TOPIC, name=name, state=state, found=found, hint=hint)


def _cores(machine: Machine) -> Finding:
    there = os.cpu_count() or machine.num_cores
    allowed = f", {machine.num_cores} of them for this process" if machine.num_cores < there else ""
    return _finding("cores", State.OK, f"{there}{allowed}")


def _memory(machine: Machine) -> Finding:
    few = machine.memory_bytes < LEAST_HOST
    words = f"{format_bytes(machine.memory_bytes)} free of {format_bytes(psutil.virtual_memory().total)}"
    return _finding("host memory", State.WARNING if few else State.OK, words, "end other processes, or fewer ranks" if few else "")


def _limits(has_gpus: bool) -> list[Finding]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    few = soft != resource.RLIM_INFINITY and soft < LEAST_FILES
    files = _finding(
        "open files",
        State.WARNING if few else State.OK,
        f"at most {_limit(soft)} a process (hard limit {_limit(hard)})",
        f"ulimit -n {LEAST_FILES}" if few else "",
    )
    locked, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    short = locked != resource.RLIM_INFINITY and bool(_infiniband())
    memory = _finding(
        "locked memory",
        State.WARNING if short else State.OK,
        "without limit" if locked == resource.RLIM_INFINITY else f"at most {format_bytes(locked)}",
        "ulimit -l unlimited: InfiniBand registers what it sends" if short else "",
    )
    return [files, memory, _shared_memory(has_gpus)]


def _limit(value: int) -> str:
    return "any number" if value == resource.RLIM_INFINITY else f"{value:,}"


def _shared_memory(has_gpus: bool) -> Finding:
    place = Path("/dev/shm")
    if not place.is_dir():
        return _finding("/dev/shm", State.WARNING if has_gpus else State.NOTE, "none", "mount one: NCCL uses it between ranks of a node")
    room = shutil.disk_usage(place).total
    small = has_gpus and room < LEAST_SHARED
    hint = "docker run --shm-size=8g, or --ipc=host" if small else ""
    return _finding("/dev/shm", State.WARNING if small else State.OK, format_bytes(room), hint)


def _clock() -> Finding:
    """Whether the kernel's clock is held by NTP or PTP: nodes put their errors in order by it."""
    status = clock_status()
    if status is None:
        return _finding("clock", State.NOTE, "the kernel does not say whether it is synchronised")
    if status & _UNSYNCHRONISED:
        hint = "chronyd or systemd-timesyncd on every node; on one machine it does not matter"
        return _finding("clock", State.NOTE, "not synchronised, by the kernel's account", hint)
    return _finding("clock", State.OK, "synchronised")


def clock_status() -> int | None:
    """Return the status word of adjtimex(2), read only; None where this system has none."""
    if not sys.platform.startswith("linux"):
        return None
    # struct timex: modes is its first int (0 reads), status the int behind four longs; 512 bytes are more than any kernel fills.
    record = (ctypes.c_long * 64)()
    if ctypes.CDLL(None).adjtimex(ctypes.byref(record)) < 0:
        return None
    return ctypes.cast(ctypes.byref(record, 5 * ctypes.sizeof(ctypes.c_long)), ctypes.POINTER(ctypes.c_int))[0]


def _infiniband() -> list[str]:
    root = Path("/sys/class/infiniband")
    return sorted(path.name for path in root.iterdir()) if root.is_dir() else []


def _network() -> Finding:
    up = [name for name, facts in psutil.net_if_stats().items() if facts.isup and name != "lo"]
    cards = _infiniband()
    fast = f"; InfiniBand or RoCE: {', '.join(cards)}" if cards else "; no InfiniBand"
    return _finding("network", State.OK if up else State.NOTE, f"{', '.join(sorted(up)) or 'loopback alone'}{fast}")


def _compiler() -> Finding:
    path = compiler_path()
    if path is None:
        return _finding("C++ compiler", State.NOTE, "none", f"{PACKAGE}, for memory.compile on processors and memory.arena=planned")
    return _finding("C++ compiler", State.OK, path)


def gpus(seen_by_driver: Sequence[Gpu], torch: TorchFacts | str) -> list[Finding]:
    """Judge each GPU, and whether torch can use what the driver shows."""
    if isinstance(torch, str):
        return []
    if torch.problem and seen_by_driver and os.environ.get("CUDA_VISIBLE_DEVICES") is None:
        return [_finding("GPUs", State.BROKEN, torch.problem, "nvidia-smi; the driver must be as new as torch's CUDA asks for")]
    if not torch.gpus:
        return [_no_gpus(seen_by_driver, torch)]
    found = []
    for index, gpu in enumerate(torch.gpus):
        busy = gpu.free_bytes < _IN_USE * gpu.total_bytes
        words = f"{gpu.name}, compute {gpu.capability}, {format_bytes(gpu.free_bytes)} free of {format_bytes(gpu.total_bytes)}"
        hint = "another process is on it: nvidia-smi names it" if busy else ""
        found.append(_finding(f"GPU {index}", State.WARNING if busy else State.OK, words, hint))
    return found


def _no_gpus(seen_by_driver: Sequence[Gpu], torch: TorchFacts) -> Finding:
    if not seen_by_driver:
        return _finding("GPUs", State.NOTE, "none", "cluster=local_cpu trains on the processors; plans for GPUs need none")
    if torch.cuda is None:
        return _finding(
            "GPUs", State.BROKEN, f"{len(seen_by_driver)}, and torch was built without CUDA", "pip install a CUDA build of torch"
        )
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
    why = f"CUDA_VISIBLE_DEVICES={hidden} hides them" if hidden is not None else f"torch's CUDA {torch.cuda} sees none of them"
    return _finding(
        "GPUs", State.BROKEN, f"{len(seen_by_driver)} by the driver, and {why}", "unset CUDA_VISIBLE_DEVICES, or a newer driver"
    )
