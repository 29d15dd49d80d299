"""How evenly the experts of each layer are used in a step, over all ranks: what metrics and the live display show."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from ...parallel.topology import Topology


def agreed_balance(counts: Tensor | None, topology: Topology) -> dict[str, Any]:
    """`balance` of the rows of all ranks. Collective on models with experts; nothing for others.

    `counts` (L, E): of this rank's layers; afterwards those of all ranks of the stage.
    """
    import torch.distributed as dist

    if counts is None:
        return {}
    dist.all_reduce(counts, group=topology.stage)
    return balance(_all_layers(counts, topology).tolist())


def agreed_losses(sums: Tensor | None, counts: Tensor | None, topology: Topology) -> dict[str, float]:
    """Entries of metrics.jsonl: both losses of routers without their weights, the layers' mean. Collective.

    `sums` (L, E + 1): of probabilities, and of squared log-sum-exps; `counts` (L, E): rows of all ranks.
    """
    import torch.distributed as dist

    if sums is None or counts is None:
        return {}
    dist.all_reduce(sums, group=topology.stage)
    sums, counts = _all_layers(sums, topology), _all_layers(counts, topology)
    probabilities, squares = sums[:, :-1].double(), sums[:, -1].double()
    shares, tokens = counts / counts.sum(1, keepdim=True).clamp(min=1), probabilities.sum(1, keepdim=True).clamp(min=1)
    even = counts.shape[1] * (shares * probabilities / tokens).sum(1)
    return {"router_balance": float(even.mean()), "router_z": float((squares / tokens.squeeze(1)).mean())}


def _all_layers(rows: Tensor, topology: Topology) -> Tensor:
    """The rows of the layers of all stages, one below the other: each stage may have another number of layers."""
    import torch
    import torch.distributed as dist

    if topology.pipeline is None:
        return rows
    stages: list[Tensor | None] = [None] * topology.num_stages
    dist.all_gather_object(stages, rows.cpu(), group=topology.pipeline.column)
    return torch.cat([stage for stage in stages if stage is not None])


def balance(counts: list[list[int]]) -> dict[str, Any]:
    """Entries of metrics.jsonl from rows by layer and expert.

    `expert_load`: rows of the busiest expert over the mean, in the layer where that is largest; 1.0 is even. `expert_load_layer`: that
    layer. `expert_load_mean`: the layers' mean. `idle_experts`: experts of all layers that no token chose.
    """
    loads = [max(row) * len(row) / max(1, sum(row)) for row in counts]
    worst = max(range(len(loads)), key=loads.__getitem__)
    return {
        "expert_load": loads[worst],
        "expert_load_layer": worst,
        "expert_load_mean": sum(loads) / len(loads),
        "idle_experts": sum(row.count(0) for row in counts),
    }
