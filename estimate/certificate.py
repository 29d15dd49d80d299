"""The fit certificate: what a step takes at most, under which assumptions, and whether a measured step kept to it. Pure.

Note: what can be compared. On a GPU the allocator counts exactly the tensors the ledger counts, so its peak is held against the
bound without the terms no tensor shows (context, communicators, what the allocator loses). On a CPU nobody counts tensors: of a
process one sees resident memory, with libraries and kernels' scratch in it. It is held against the whole bound and what waits on
the host, snapshots included, which is the same memory there. Ranks give large blocks back when they are freed
(utils/c_allocator.py), else the C library would keep them. Libraries are an assumed part, so that is a coarser check, and it is
named as what it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..units import format_bytes, format_tokens
from .footprint.optimizer import host_optimizer_bytes
from .footprint.term import FORWARD_ALONE
from .ledger import Ledger
from .solver.report import SolveReport, describe_policy

RECORD = "docs/benchmarks.md"
OUTSIDE = ("context", "communicators", "allocator reserve")
"""Terms that are assumed, and that no allocator of tensors shows."""
_IN_RANKS = ("checkpoint snapshots", "data staging")
"""Terms of the node that lie in memory its ranks have mapped."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Certificate:
    """An upper bound for the memory of every rank, and what it rests on."""

    policy: tuple[str, ...]
    place: str
    """`GPU` or `rank`."""
    device_bytes: int
    device_phase: str
    device_capacity_bytes: int
    evaluation_bytes: int
    """The part of it that an evaluation, or scoring, takes at most: forward passes alone."""
    host_bytes: int
    host_capacity_bytes: int
    comparable_bytes: int
    """The part of the device's bound that can be measured."""
    compared: str
    """What is held against it, in words."""
    fits: bool
    proof: str | None
    """What the solver showed, with memory.solve."""
    assumptions: tuple[str, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Check:
    """One measured step against its certificate."""

    predicted_bytes: int
    measured_bytes: tuple[int, ...]
    """Bytes that each rank measured."""
    compared: str

    @property
    def ok(self) -> bool:
        return max(self.measured_bytes) <= self.predicted_bytes


def certify(ledger: Ledger) -> Certificate:
    """The certificate of a ledger; one that does not fit says so."""
    s, device = ledger.inputs, ledger.device
    report: SolveReport | None = ledger.report
    return Certificate(
        policy=describe_policy(s.policy, s),
        place=device.name,
        device_bytes=device.peak_bytes,
        device_phase=device.peak_phase.value,
        device_capacity_bytes=device.capacity_bytes,
        evaluation_bytes=max(device.phase_bytes(phase) for phase in FORWARD_ALONE),
        host_bytes=ledger.host.peak_bytes,
        host_capacity_bytes=ledger.host.capacity_bytes,
        comparable_bytes=_comparable(ledger),
        compared="held by the allocator" if s.on_gpu else "resident, libraries in",
        fits=ledger.fits,
        proof=report.proof if report is not None and report.feasible else None,
        assumptions=_assumptions(ledger),
    )


def _comparable(ledger: Ledger) -> int:
    s = ledger.inputs
    unseen = OUTSIDE if s.on_gpu else ()
    phases = {phase for term in ledger.device.terms for phase in term.by_phase}
    most = max(sum(term.by_phase.get(phase, 0) for term in ledger.device.terms if term.name not in unseen) for phase in phases)
    # A rank without a GPU has what waits on the host in its own resident memory. (Mapped files do not stay there.)
    waiting = 0 if s.policy.offload_dir is not None else ledger.arena_bytes
    beside = sum(term.num_bytes for term in ledger.host.terms if term.name in _IN_RANKS) // s.layout.ranks_per_node
    return most if s.on_gpu else most + waiting + host_optimizer_bytes(ledger.on_host) + beside


def _assumptions(ledger: Ledger) -> tuple[str, ...]:
    s = ledger.inputs
    reasons = [
        f"sequences have up to {format_tokens(s.data.max_seq_len)} tokens, and a rank up to {format_tokens(s.tokens)} in a micro-batch",
        "one rank a GPU, and nothing else on it" if s.on_gpu else "the ranks share the memory of the machine with nothing large",
    ]
    if s.expert_parallel > 1:
        reasons.append(f"no rank's experts get more than {s.row_share:g} times the mean of the rows (assumed)")
    reasons += [f"{term.name}: {term.note}" for term in ledger.device.terms if term.name in OUTSIDE]
    return tuple(reasons)


def bound_line(certificate: Certificate) -> str:
    """`at most 79.1 GiB on each GPU (backward mlp) of 80.0 GiB, 1.2 TiB on each node of 1.8 TiB`"""
    c = certificate
    return (
        f"at most {format_bytes(c.device_bytes)} on each {c.place} ({c.device_phase}) of {format_bytes(c.device_capacity_bytes)}, "
        f"{format_bytes(c.host_bytes)} on each node of {format_bytes(c.host_capacity_bytes)}"
    )


def check_line(predicted_bytes: int, measured_bytes: Sequence[int], compared: str) -> str:
    """The outcome for a person; one that broke the bound says which rank, by how much and what to do."""
    most = max(measured_bytes)
    if most <= predicted_bytes:
        return f"the memory certificate holds: {format_bytes(most)} {compared}, at most {format_bytes(predicted_bytes)} predicted"
    rank = list(measured_bytes).index(most)
    return (
        f"the memory certificate does not hold: {format_bytes(most)} {compared} on rank {rank}, "
        f"{format_bytes(most - predicted_bytes)} more than predicted; the run goes on, but leave room: memory=auto with a smaller "
        "cluster.device_memory_bytes"
    )
