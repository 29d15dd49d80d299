"""What one policy costs, as the solver reads it from the ledger and the timing. Pure."""

from __future__ import annotations

from dataclasses import replace

from ...memory.policy import MemoryPolicy
from ..footprint.host import arena_bytes, moved_bytes
from ..footprint.term import ALL, KEEPING
from ..ledger import budget_account, device_account, host_account
from ..plan_inputs import PlanInputs
from ..timing.flops import layer_backward_s, layer_forward_s, layer_recompute_s
from ..timing.offload import from_host_s, to_host_s
from ..timing.step import estimate_time, sharding_s
from .shapes import BUDGET, Evaluate, PolicyCost


def measure_of(inputs: PlanInputs) -> Evaluate:
    """Bytes by phase and seconds of the setting with any policy."""

    def measure(policy: MemoryPolicy) -> PolicyCost:
        return measures(replace(inputs, policy=policy))

    return measure


def measures(inputs: PlanInputs) -> PolicyCost:
    """Cost of one setting as it is. Rows begin with `device` or `host`."""
    layers = inputs.passes * inputs.spec.num_layers
    forward, backward = layers * layer_forward_s(inputs), layers * (layer_backward_s(inputs) + layer_recompute_s(inputs))
    timing = estimate_time(inputs)
    return PolicyCost(
        read_rows=lambda: _rows(inputs),
        read_rounding=lambda: _rounding(inputs),
        forward_s=forward,
        backward_s=backward,
        to_host_s=layers * to_host_s(inputs),
        from_host_s=layers * from_host_s(inputs),
        # Embedding, head, exchanges and the update: the same whatever is kept.
        fixed_s=timing.compute_s - forward - backward + timing.sequence_s + timing.experts_s + timing.update_s,
        hidden_s=sharding_s(inputs) - (timing.compute_s - forward - backward),
    )


def _rows(inputs: PlanInputs) -> dict[str, tuple[float, float]]:
    device = device_account(inputs)
    host = host_account(inputs, device)
    rows = {f"device, {phase.value}": (float(device.phase_bytes(phase)), float(device.usable_bytes)) for phase in ALL}
    rows |= {f"host, {phase.value}": (float(host.phase_bytes(phase)), float(host.capacity_bytes)) for phase in ALL}
    budget = budget_account(inputs, host)
    if budget is not None:
        rows[BUDGET] = float(budget.peak_bytes), float(budget.capacity_bytes)
    return rows


def _rounding(inputs: PlanInputs) -> dict[str, float]:
    if inputs.policy.offload_dir is not None:
        return {}
    size = float(inputs.layout.ranks_per_node * (arena_bytes(inputs) - moved_bytes(inputs)))
    return dict.fromkeys([BUDGET, *(f"host, {phase.value}" for phase in KEEPING)], size)
