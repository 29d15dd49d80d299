"""What one policy costs, as the solver reads it from the ledger and the timing. Pure."""

from __future__ import annotations

from dataclasses import replace

from .ledger import budget_account, device_account, host_account
from .link import from_host_s, to_host_s
from .policy import MemoryPolicy
from .setting import ALL, KEEPING, Setting
from .shapes import BUDGET, Measure, Measures
from .terms_host import arena_bytes, moved_bytes
from .timing import estimate_time, sharding_s
from .work import layer_backward_s, layer_forward_s, layer_recompute_s


def measure_of(setting: Setting) -> Measure:
    """Bytes by phase and seconds of the setting with any policy."""

    def measure(policy: MemoryPolicy) -> Measures:
        return measures(replace(setting, policy=policy))

    return measure


def measures(s: Setting) -> Measures:
    """Of one setting as it is. Rows begin with `device` or `host`."""
    layers = s.passes * s.spec.num_layers
    forward, backward = layers * layer_forward_s(s), layers * (layer_backward_s(s) + layer_recompute_s(s))
    timing = estimate_time(s)
    return Measures(
        read_rows=lambda: _rows(s),
        read_rounding=lambda: _rounding(s),
        forward_s=forward,
        backward_s=backward,
        to_host_s=layers * to_host_s(s),
        from_host_s=layers * from_host_s(s),
        # Embedding, head, exchanges and the update: the same whatever is kept.
        fixed_s=timing.compute_s - forward - backward + timing.sequence_s + timing.update_s,
        hidden_s=sharding_s(s) - (timing.compute_s - forward - backward),
    )


def _rows(s: Setting) -> dict[str, tuple[float, float]]:
    device = device_account(s)
    host = host_account(s, device)
    rows = {f"device, {phase.value}": (float(device.phase_bytes(phase)), float(device.capacity_bytes)) for phase in ALL}
    rows |= {f"host, {phase.value}": (float(host.phase_bytes(phase)), float(host.capacity_bytes)) for phase in ALL}
    budget = budget_account(s, host)
    if budget is not None:
        rows[BUDGET] = float(budget.peak_bytes), float(budget.capacity_bytes)
    return rows


def _rounding(s: Setting) -> dict[str, float]:
    if s.policy.offload_dir is not None:
        return {}
    size = float(s.layout.ranks_per_node * (arena_bytes(s) - moved_bytes(s)))
    return dict.fromkeys([BUDGET, *(f"host, {phase.value}" for phase in KEEPING)], size)
