"""Builds the ledger from its inputs, with the memory policy solved where that is asked for. Pure, no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .footprint.host import file_bytes
from .ledger import Ledger, budget_account, device_account, host_account, resolve_grad_reduce
from .plan_inputs import PlanInputs
from .solver.report import SolveReport
from .solver.solve import solve_memory
from .timing.step import estimate_time

if TYPE_CHECKING:
    from .solver.report import SolveReport


def build_ledger(inputs: PlanInputs) -> Ledger:
    """The ledger of a step whose sequences all have `data.max_seq_len` tokens.

    With memory.solve the policy is solved (estimate/solver/solve.py). Where none fits, the ledger is that of the one that needs least.
    """
    if inputs.memory.solve:
        return _ledger(inputs, *solve_memory(inputs))
    return _ledger(inputs, resolve_grad_reduce(inputs))


def _ledger(asked: PlanInputs, inputs: PlanInputs, report: SolveReport | None = None) -> Ledger:
    device = device_account(inputs)
    host = host_account(inputs, device)
    return Ledger(
        asked=asked,
        inputs=inputs,
        device=device,
        host=host,
        budget=budget_account(inputs, host),
        file_bytes=file_bytes(inputs),
        timing=estimate_time(inputs),
        report=report,
    )
