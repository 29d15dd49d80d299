"""The report of a rank that ran out of memory: where, ledger against allocator, the largest thing nobody planned, and the cure. Pure.

Note: the cure. The configuration fitted by the ledger, and yet the memory ran out: either tensors took more than the ledger
counts, or the device has less room for them than it says. Both are read off the allocator's numbers, and the configuration is
solved once more for a device that is smaller by as much. What is suggested fits that smaller device, by the same ledger.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from ..errors import PlanError
from ..memory.position import Position
from ..units import format_bytes
from .build import build_ledger
from .certificate import OUTSIDE
from .footprint.term import BACKWARD, Phase
from .ledger import Ledger
from .solver.report import percent
from .suggestions import suggest

if TYPE_CHECKING:
    from ..cluster.config import ClusterConfig

MIB = 1 << 20
_MARGIN = 0.02
"""Share left free of what a device turned out to hold."""
_SIZE = re.compile(r"tried to allocate ([0-9.]+)\s*(bytes|B|KiB|MiB|GiB|TiB)?", re.IGNORECASE)
_UNITS = {"BYTES": 1, "B": 1, "KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30, "TIB": 1 << 40}


class OutOfMemory(PlanError):
    """A device or a host had less memory than a step took."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Numbers:
    """The allocator's numbers at the moment it failed; bytes."""

    requested: int
    """That could not be had."""
    active: int
    """Bytes in tensors. On a CPU: by how much resident memory has grown since the run had built its model, and the weights."""
    reserved: int
    """Bytes the allocator has reserved; on a CPU the same as active."""
    total: int
    """Bytes of the device; on a CPU a rank's share."""
    others: int = 0
    """Bytes of the device used by neither this rank's allocator nor its context as planned."""


def requested_bytes(message: str) -> int:
    """The bytes requested, from an allocator's error; 0 where it has none."""
    size = _SIZE.search(message)
    return int(float(size[1]) * _UNITS[(size[2] or "bytes").upper()]) if size else 0


def oom_report(ledger: Ledger, numbers: Numbers, position: Position, *, rank: int, step: int, resume: str) -> OutOfMemory:
    """The error for a person. `resume`: the command that resumes the run, to which overrides are added."""
    place = ledger.device.name
    planned = _planned_bytes(ledger, position)
    size = usable_bytes(ledger, numbers, planned)
    smaller = replace(ledger.asked.cluster, device_memory_bytes=size)
    name, more = _largest_unplanned(ledger, numbers, planned)
    unplanned = f"; largest that was not planned: {name}, {format_bytes(more)}" if more > 0 else ""
    asked = f"{format_bytes(numbers.requested)} more were asked for, with " if numbers.requested else ""
    return OutOfMemory(
        f"out of memory on rank {rank}, step {step}, {position}",
        found=f"{asked}{_resident(ledger, numbers)} on a {place} of {format_bytes(numbers.total)}{unplanned}",
        expected=f"at most {format_bytes(planned)} there, by the ledger: {_largest_terms(ledger, position)}",
        hint=_cure(ledger, smaller, f"cluster.device_memory_bytes={size // MIB}MiB", resume),
    )


def _resident(ledger: Ledger, numbers: Numbers) -> str:
    if not ledger.inputs.on_gpu:
        return f"about {format_bytes(numbers.active)} in tensors"
    between = numbers.reserved - numbers.active
    return (
        f"{format_bytes(numbers.active)} in tensors and {format_bytes(numbers.reserved)} reserved ({format_bytes(between)} between blocks)"
    )


def _phases(position: Position) -> tuple[Phase, ...]:
    phases = {
        "forward": (Phase.FORWARD,),
        "loss": (Phase.LOSS,),
        "backward": (*BACKWARD, Phase.REDUCE),
        "weight gradients": (Phase.REDUCE,),
        "optimizer": (Phase.OPTIMIZER,),
    }
    return phases.get(position.phase, tuple(Phase))


def _planned_bytes(ledger: Ledger, position: Position) -> int:
    """Most bytes that the plan gives the allocator in the phase of the position."""
    seen = [term for term in ledger.device.terms if term.name not in OUTSIDE]
    return max(sum(term.by_phase.get(phase, 0) for term in seen) for phase in _phases(position))


def _largest_terms(ledger: Ledger, position: Position) -> str:
    terms = [term for term in ledger.device.terms if term.name not in OUTSIDE]
    phase = max(_phases(position), key=lambda phase: sum(term.by_phase.get(phase, 0) for term in terms))
    largest = sorted(terms, key=lambda term: -term.by_phase.get(phase, 0))[:4]
    return ", ".join(f"{term.name} {format_bytes(term.by_phase[phase])}" for term in largest if term.by_phase.get(phase, 0))


def _largest_unplanned(ledger: Ledger, numbers: Numbers, planned: int) -> tuple[str, int]:
    reserve = sum(term.num_bytes for term in ledger.device.terms if term.name == "allocator reserve")
    excess = {
        "tensors beyond the ledger's" if ledger.inputs.on_gpu else "memory beyond the ledger's": numbers.active
        + numbers.requested
        - planned,
        "lost between the allocator's blocks": numbers.reserved - numbers.active - reserve,
        "held by others on the device": numbers.others,
        "less room than cluster.device_memory_bytes": ledger.device.capacity_bytes - numbers.total,
    }
    return max(excess.items(), key=lambda item: item[1])


def usable_bytes(ledger: Ledger, numbers: Numbers, planned: int) -> int:
    """The cluster.device_memory_bytes for which the ledger would have foreseen this end, less a margin; whole MiB.

    What a plan may take is cluster.reserve less than that, so the size is as much larger.
    """
    capacity = ledger.device.capacity_bytes
    unseen = sum(term.num_bytes for term in ledger.device.terms if term.name in OUTSIDE)
    over = max(0, numbers.active + numbers.requested - planned)
    room = min(capacity, numbers.active + numbers.requested + unseen)
    # A device for which the present plan fits would not change anything.
    least = min(room, capacity - over, ledger.device.peak_bytes - max(MIB, numbers.requested))
    return max(MIB, int(least * (1.0 - _MARGIN) / (1.0 - ledger.asked.cluster.reserve)) // MIB * MIB)


def _cure(ledger: Ledger, cluster: ClusterConfig, limit: str, resume: str) -> str:
    """The first override set that the solver certifies on the smaller machine, as a command, and what it costs."""
    try:
        smaller = build_ledger(ledger.asked.with_parts(cluster=cluster))
        if smaller.fits and ledger.asked.memory.solve:
            return _command(resume, (limit,), smaller, ledger)
        for entry in suggest(smaller, most=1, elsewhere=False):
            overrides = (*entry.overrides, limit) if entry.ledger.inputs.memory.solve else entry.overrides
            return _command(resume, overrides, entry.ledger, ledger)
    except (MemoryError, ImportError):  # of the process itself: a solver that cannot be loaded any more
        return f"{resume} memory=auto {limit}\n  (not certified: no memory was left to solve for it; efflaunch plan tells)"
    return f"nothing this planner knows fits with {limit}: a smaller model, shorter sequences, or a larger machine"


def _command(resume: str, overrides: tuple[str, ...], cure: Ledger, ledger: Ledger) -> str:
    change = cure.timing.step_s / ledger.timing.step_s - 1.0
    pace = "as fast" if abs(change) < 0.0005 else f"{percent(abs(change))} {'slower' if change > 0 else 'faster'}"
    return f"{resume} {' '.join(overrides)}\n  (certified: at most {format_bytes(cure.device.peak_bytes)}; {pace}, by the estimate)"


def host_report(ledger: Ledger, free_bytes: int, limited_by: str, *, rank: int, node: str, step: int, resume: str) -> OutOfMemory:
    """The error where a node, that of `rank`, is about to run out; the step is finished and saved. The cure has a quarter less there."""
    largest = sorted(ledger.host.terms, key=lambda term: -term.num_bytes)[:4]
    named = ", ".join(f"{term.name} {format_bytes(term.num_bytes)}" for term in largest)
    cluster = ledger.asked.cluster
    size = int(0.75 * min(cluster.host_memory_bytes, ledger.host.peak_bytes)) // MIB * MIB
    limit = f"cluster.host_memory_bytes={size // MIB}MiB"
    return OutOfMemory(
        f"host memory, on {node}, the node of rank {rank}, after step {step}",
        found=f"{format_bytes(free_bytes)} left ({limited_by}), before the kernel kills a rank",
        expected=f"room beside {format_bytes(ledger.host.peak_bytes)} of the plan: {named}",
        hint=_cure(ledger, replace(cluster, host_memory_bytes=size), limit, resume),
    )
