"""Builds the long events of metrics.jsonl, `start` and `step` (docs/runs.md lists the keys)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from ...checkpoint.restore import Restored
from ...estimate.certificate import Certificate
from ...model.spec import num_parameters
from ...parallel.sequence.plan import StepPlan
from ..optimizers.check import describe, inexact
from ..run_settings import RunSettings
from ..session import Session
from ..step_planner import Costs
from .step_results import Results
from .stragglers import Straggler


def start_fields(
    config: RunSettings, session: Session, costs: Costs, certificate: Certificate, restored: Restored | None, hosts: Sequence[str]
) -> dict[str, Any]:
    """Fields of the `start` event; `hosts` of every rank."""
    return {
        "steps": config.train.steps,
        "world_size": session.topology.world_size,
        "hosts": list(hosts[:: config.cluster.ranks_per_node]),
        "parameters": num_parameters(session.spec),
        "trained_parameters": session.ledger.inputs.trained_parameters,
        "plan": str(session.layout),
        "sequence": config.parallel.sequence.value,
        "optimizer": describe(config.optim),
        "optimizer_inexact": list(inexact(config.optim)),
        "costs": costs.origin,
        "cost_model": asdict(costs.model),
        "excluded_degrees": {str(degree): reason for degree, reason in costs.model.excluded},
        "data": session.source.summary(),
        "memory": list(certificate.policy),
        "certificate": asdict(certificate),
        "resumed_from": restored.step if restored is not None else None,
        "restored_from": restored.origin if restored is not None else None,
        "skipped_checkpoints": list(restored.skipped) if restored is not None else [],
    }


def step_fields(
    results: Results, plan: StepPlan, *, step_s: float, total_tokens: int, arena: dict[str, Any] | None, num_stages: int = 1
) -> dict[str, Any]:
    """Fields of the `step` event, beside those of the optimizer, the objective and the planner."""
    tokens = sum(results.tokens) // num_stages
    per_rank = enumerate(zip(results.tokens, results.peak_bytes, results.own_s, strict=True))
    return {
        "loss": results.loss,
        "tokens": tokens,
        "sequences": len(plan.lengths),
        "step_s": step_s,
        "tokens_per_s": tokens / step_s,
        "micro_batches": len(plan.micro_batches),
        "plan": str(plan),
        **({} if arena is None else {"arena": arena}),
        "ranks": [{"rank": rank, "tokens": count, "peak_bytes": peak, "own_s": own} for rank, (count, peak, own) in per_rank],
        "total_tokens": total_tokens,
    }


def straggler_rows(stragglers: Sequence[Straggler], hosts: Sequence[str]) -> list[dict[str, Any]]:
    """Rows of the `stragglers` event: every rank that counts as one now."""
    return [{"rank": one.rank, "host": hosts[one.rank], "ratio": one.ratio} for one in stragglers]
