"""Which of a machine's GPUs a process can use: CUDA_VISIBLE_DEVICES by index and UUID, and slices of MIG. Pure.

The rules are CUDA's (programming guide, environment variables; MIG user guide, device names): entries are taken in their order up to
the first that names nothing, an abbreviated UUID is one that fits a single GPU, a GPU twice makes none visible, and where a GPU is in
MIG mode its slices stand in its place, of which a process sees the first alone.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

_SLICE = re.compile(r"^\s+MIG\s+(?P<profile>\S+)\s+Device\s+\d+:\s+\(UUID:\s*(?P<uuid>MIG-[^)\s]+)\)")
_GPU = re.compile(r"^GPU\s+\d+:\s+(?P<name>.+?)\s+\(UUID:\s*(?P<uuid>GPU-[^)\s]+)\)")
_PROFILE_GB = re.compile(r"\.(\d+)gb")


@dataclass(frozen=True, slots=True)
class Gpu:
    """A GPU, or a slice of one."""

    name: str
    memory_bytes: int
    free_bytes: int | None = None
    """Bytes not in use by any process; None where unknown."""
    uuid: str = ""
    """`GPU-...` or `MIG-...`; empty where unknown."""
    slices: tuple[Gpu, ...] = ()
    """Its slices where it is in MIG mode: processes cannot use it as a whole."""
    in_mig_mode: bool = False


def visible_gpus(gpus: Sequence[Gpu], variable: str | None) -> list[Gpu]:
    """GPUs that CUDA shows of all `gpus` of a machine, in their order; `variable`: CUDA_VISIBLE_DEVICES, None where it is not set."""
    chosen = list(gpus) if variable is None else _named(gpus, variable)
    shown: list[Gpu] = []
    for gpu in chosen:
        shown += gpu.slices if gpu.in_mig_mode else [gpu]
    mig = [gpu for gpu in shown if gpu.uuid.startswith("MIG-")]
    # A process with a slice sees that one alone.
    return mig[:1] if mig else shown


def _named(gpus: Sequence[Gpu], variable: str) -> list[Gpu]:
    found: list[Gpu] = []
    for entry in variable.split(","):
        gpu = _entry(gpus, entry.strip())
        if gpu is None:
            break
        found.append(gpu)
    twice = len({id(gpu) for gpu in found}) < len(found)
    return [] if twice else found


def _entry(gpus: Sequence[Gpu], entry: str) -> Gpu | None:
    if entry.isdecimal():
        return gpus[int(entry)] if int(entry) < len(gpus) else None
    named = [gpu for whole in gpus for gpu in (whole, *whole.slices) if gpu.uuid.startswith(entry)] if "-" in entry[1:] else []
    return named[0] if len(named) == 1 else None


def parse_list(text: str) -> dict[str, tuple[Gpu, ...]]:
    """Slices by their GPU's UUID, from what `nvidia-smi -L` prints; a slice's memory is that of its profile, `1g.10gb`."""
    slices: dict[str, list[Gpu]] = {}
    name, last = "", ""
    for line in text.splitlines():
        if gpu := _GPU.match(line):
            name, last = gpu["name"], gpu["uuid"]
        elif (part := _SLICE.match(line)) and last:
            size = _PROFILE_GB.search(part["profile"])
            found = Gpu(f"{name} MIG {part['profile']}", int(size[1]) << 30 if size else 0, uuid=part["uuid"])
            slices.setdefault(last, []).append(found)
    return {uuid: tuple(parts) for uuid, parts in slices.items()}
