"""Estimates the stages of train.stages, with the layout and the memory policy of the whole run. Pure, no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from ..errors import PlanError
from ..parallel.config import SequenceMode
from ..parallel.layout import solve_layout
from ..units import format_bytes, format_tokens
from .build import build_ledger
from .ledger import Ledger

if TYPE_CHECKING:
    from ..training.data.config import DataConfig


@dataclass(frozen=True, slots=True)
class StagePlan:
    """A stage's data settings and its ledger."""

    data: DataConfig
    ledger: Ledger


def stage_plans(run: Ledger, stages: Sequence[DataConfig]) -> tuple[StagePlan, ...]:
    """The ledger of each stage, of its own longest sequences and batch; all else as `run` has decided it."""
    return tuple(StagePlan(data, _stage_ledger(run, data)) for data in stages)


def _stage_ledger(run: Ledger, data: DataConfig) -> Ledger:
    asked, parallel = run.asked, run.inputs.parallel
    length, batch = data.max_seq_len, data.global_batch_tokens
    # Groups are the run's: only micro-batches are counted anew. (With parallel.sequence=adaptive they are each step's own.)
    same = replace(parallel, sequence=SequenceMode.STATIC, sp_degree=run.layout.sp_degree)
    own = solve_layout(same, asked.cluster, asked.spec, max_seq_len=length, global_batch_tokens=batch)
    layout = replace(run.layout, num_micro_batches=own.num_micro_batches, sequences_per_group=own.sequences_per_group)
    return build_ledger(
        replace(asked, data=data, layout=layout, parallel=parallel, policy=run.inputs.policy, memory=replace(asked.memory, solve=False))
    )


def check_stage_plans(run: Ledger, stages: Sequence[DataConfig]) -> None:
    """PlanError for a stage that may take more memory than the plan and the certificate of the run allow."""
    for number, plan in enumerate(stage_plans(run, stages)):
        for mine, whole in zip(plan.ledger.accounts, run.accounts, strict=True):
            if mine.peak_bytes > whole.peak_bytes:
                data, policy = plan.data, f"memory={run.inputs.memory.name}"
                shape = f"sequences up to {format_tokens(data.max_seq_len)} in steps of {format_tokens(data.global_batch_tokens)} tokens"
                raise PlanError(
                    f"train.stages[{number}]",
                    found=f"{format_bytes(mine.peak_bytes)} on each {mine.name} for {shape}",
                    expected=f"at most {format_bytes(whole.peak_bytes)}, which {policy} is planned for by data.max_seq_len",
                    hint="a smaller batch in that stage, or a run of its own for it",
                )
