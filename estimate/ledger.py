"""The ledger: what each rank and each node must hold, whether it fits, and how long a step takes. Pure, no torch."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from ..parallel.config import GradReduce
from ..parallel.layout import Layout
from .footprint.device import device_terms
from .footprint.host import arena_bytes, host_terms
from .footprint.term import ALL, Phase, Term
from .plan_inputs import PlanInputs, reduction_of_engine
from .timing.step import Timing

if TYPE_CHECKING:
    from .solver.report import SolveReport
    from .stages import StageMemory


@dataclass(frozen=True, kw_only=True, slots=True)
class Account:
    """One memory: its terms and how much there is."""

    name: str
    terms: tuple[Term, ...]
    capacity_bytes: int
    """Bytes there are."""
    reserve_bytes: int = 0
    """Bytes of them that are never planned into (cluster.reserve)."""

    @property
    def usable_bytes(self) -> int:
        """What a plan may use."""
        return self.capacity_bytes - self.reserve_bytes

    def phase_bytes(self, phase: Phase) -> int:
        return sum(entry.by_phase.get(phase, 0) for entry in self.terms)

    @property
    def peak_phase(self) -> Phase:
        return max(ALL, key=self.phase_bytes)

    @property
    def peak_bytes(self) -> int:
        return self.phase_bytes(self.peak_phase)

    @property
    def fits(self) -> bool:
        return self.peak_bytes <= self.usable_bytes

    @property
    def largest(self) -> Term:
        """The biggest term at the peak."""
        return max(self.terms, key=lambda entry: entry.by_phase.get(self.peak_phase, 0))


@dataclass(frozen=True, kw_only=True, slots=True)
class Ledger:
    """The memory of one rank and of one node, and the time of a step, for one configuration."""

    asked: PlanInputs
    """Inputs as configured; `inputs` is the same with what was left to `auto` decided."""
    inputs: PlanInputs
    device: Account
    host: Account
    budget: Account | None
    """memory.host_budget, where it is given."""
    file_bytes: int
    """What one node writes under memory.offload_dir and reads back; no capacity is known for it."""
    timing: Timing
    report: SolveReport | None = None
    """How the policy was found, with memory.solve."""
    stages: tuple[StageMemory, ...] = ()
    """Each stage of a pipeline: `inputs` and `device` are of that which holds most. Empty where there is one stage."""
    fullest_on_host: PlanInputs | None = None
    """Inputs of the stage whose node holds most; None where there is one stage."""
    slowest_stage: PlanInputs | None = None
    """Inputs of the stage that takes longest; None where there is one stage."""

    @property
    def layout(self) -> Layout:
        return self.inputs.layout

    @property
    def slowest(self) -> PlanInputs:
        """Inputs whose ranks set the pace of a step."""
        return self.slowest_stage or self.inputs

    @property
    def on_host(self) -> PlanInputs:
        """Inputs of the ranks that the host's account is of."""
        return self.fullest_on_host or self.inputs

    @property
    def arena_bytes(self) -> int:
        """What each rank opens its host store with: room for the stage that moves most."""
        return max((stage.arena_bytes for stage in self.stages), default=arena_bytes(self.inputs))

    @property
    def whole(self) -> PlanInputs:
        """Inputs of all stages together, everything decided."""
        decided = self.inputs
        return replace(self.asked, policy=decided.policy, parallel=decided.parallel) if self.stages else decided

    @property
    def accounts(self) -> tuple[Account, ...]:
        """All that have a capacity."""
        return (self.device, self.host, *((self.budget,) if self.budget is not None else ()))

    @property
    def fits(self) -> bool:
        return all(account.fits for account in self.accounts)


def resolve_grad_reduce(inputs: PlanInputs) -> PlanInputs:
    """Resolves `auto`: once per step without barriers, or where whole gradients fit on the device, else after every micro-batch."""
    if inputs.parallel.grad_reduce is not GradReduce.AUTO:
        return inputs
    if (own := reduction_of_engine(inputs)) is not None:
        return replace(inputs, parallel=replace(inputs.parallel, grad_reduce=own))
    per_step = replace(inputs, parallel=replace(inputs.parallel, grad_reduce=GradReduce.STEP))
    if inputs.parallel.barrier_free or device_account(per_step).fits:
        return per_step
    return replace(inputs, parallel=replace(inputs.parallel, grad_reduce=GradReduce.MICRO_BATCH))


def device_account(inputs: PlanInputs) -> Account:
    """Memory of one rank, with the part of it that stays free."""
    size = inputs.cluster.device_memory_bytes
    reserve = int(inputs.cluster.reserve * size)
    return Account(name="GPU" if inputs.on_gpu else "rank", terms=device_terms(inputs), capacity_bytes=size, reserve_bytes=reserve)


def host_account(inputs: PlanInputs, device: Account) -> Account:
    return Account(name="host", terms=host_terms(inputs, device.peak_bytes), capacity_bytes=inputs.cluster.host_memory_bytes)


def budget_account(inputs: PlanInputs, host: Account) -> Account | None:
    """What memory.host_budget limits: activations and optimizer states of one node."""
    if inputs.memory.host_budget is None:
        return None
    limited = tuple(entry for entry in host.terms if entry.name in ("activations on the host", "optimizer states on the host"))
    return Account(name="host budget", terms=limited, capacity_bytes=inputs.memory.host_budget)
