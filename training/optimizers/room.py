"""Checks that host memory suffices for an optimizer on the host, before any rank takes it."""

from __future__ import annotations

import torch.distributed as dist

from ...errors import ConfigError
from ...estimate.footprint.host import arena_bytes
from ...estimate.footprint.optimizer import host_optimizer_bytes
from ...estimate.plan_inputs import PlanInputs
from ...memory.offload.checks import FreeMemory, free_memory
from ...parallel.topology import whole_world
from ...units import format_bytes


def check_update_memory(inputs: PlanInputs, free: FreeMemory | None = None) -> None:
    """Raise ConfigError where states on the host, and the activations that go there too, are more than is free on this node.

    Returns once every rank has looked. Collective where there are states on the host.
    """
    if not inputs.residency.on_host:
        return
    free = free or free_memory()
    ranks, states = inputs.layout.ranks_per_node, host_optimizer_bytes(inputs)
    moved = arena_bytes(inputs) if inputs.policy.uses_host and inputs.policy.offload_dir is None else 0
    if ranks * (states + moved) > free.num_bytes:
        beside = f" beside {format_bytes(ranks * moved)} of activations" if moved else ""
        raise ConfigError(
            "optim.state_device=host",
            found=f"{format_bytes(free.num_bytes)} of host memory free on this node ({free.limited_by})",
            expected=f"{format_bytes(ranks * states)} for the optimizer of {ranks} rank{'s' * (ranks != 1)}{beside}",
            hint="optim.update=backward (no gradients wait there), optim.state_dtype=8bit (not exact), more nodes, or "
            "optim.state_device=device",
        )
    if dist.is_initialized():
        dist.barrier(group=whole_world())
