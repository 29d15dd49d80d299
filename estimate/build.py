"""Builds the ledger from its inputs, with the memory policy solved where that is asked for. Pure, no torch."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from .footprint.host import file_bytes
from .ledger import Ledger, budget_account, device_account, host_account, resolve_grad_reduce
from .plan_inputs import PlanInputs
from .solver.report import SolveReport
from .solver.solve import solve_memory
from .stages import layers_by_rank, memories, micro_batch_s, peak_bytes, pipelined, stage_inputs
from .timing.step import estimate_time

if TYPE_CHECKING:
    from .solver.report import SolveReport


def build_ledger(inputs: PlanInputs) -> Ledger:
    """The ledger of a step whose sequences all have `data.max_seq_len` tokens.

    With memory.solve the policy is solved (estimate/solver/solve.py). Where none fits, the ledger is that of the one that needs least.
    """
    if inputs.layout.stages > 1:
        return _of_stages(inputs)
    return _ledger(inputs, *_decided(inputs))


def _decided(inputs: PlanInputs) -> tuple[PlanInputs, SolveReport | None]:
    """The inputs with everything decided that was left open, and how."""
    return solve_memory(inputs) if inputs.memory.solve else (resolve_grad_reduce(inputs), None)


def _of_stages(inputs: PlanInputs) -> Ledger:
    """The ledger of the stage that holds most. All stages have one policy: that of the one that has least room, if all fit with it."""
    layers, stages = layers_by_rank(inputs), stage_inputs(inputs)
    ledgers = []
    for tightest in sorted(stages, key=peak_bytes, reverse=True):
        decided, report = _decided(tightest)
        all_decided = tuple(replace(stage, policy=decided.policy, parallel=decided.parallel) for stage in stages)
        fullest = max(all_decided, key=peak_bytes)
        device = device_account(fullest)
        ledger = _ledger(inputs, fullest, report, host=max(all_decided, key=lambda stage: host_account(stage, device).peak_bytes))
        stages_of_it, slowest = memories(all_decided, layers), max(all_decided, key=micro_batch_s)
        ledgers.append(replace(ledger, timing=pipelined(all_decided), stages=stages_of_it, slowest_stage=slowest))
        if ledgers[-1].fits:
            return ledgers[-1]
    return ledgers[0]


def _ledger(asked: PlanInputs, inputs: PlanInputs, report: SolveReport | None = None, host: PlanInputs | None = None) -> Ledger:
    """The ledger of `inputs`; `host`: of the stage whose node holds most; None: the same."""
    device, on_host = device_account(inputs), host or inputs
    node = host_account(on_host, device)
    return Ledger(
        asked=asked,
        inputs=inputs,
        device=device,
        host=node,
        budget=budget_account(on_host, node),
        file_bytes=file_bytes(on_host),
        fullest_on_host=host,
        timing=estimate_time(inputs),
        report=report,
    )
