"""How evenly the experts of each layer are used in a step, over all ranks: what metrics and the live display show."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor
    from torch.distributed import ProcessGroup

    from ...memory.executor.mixture import ExpertLoad
    from ...model.stage import Stage
    from ...parallel.topology import Topology


def agreed_rows(load: ExpertLoad, stage: ProcessGroup) -> tuple[Tensor | None, tuple[int, ...]]:
    """Rows of all ranks by layer and expert, behind them those dropped (L, E + 1), and the layers' numbers; the count starts anew.

    Collective over `stage`, on models with experts; None for others.
    """
    import torch.distributed as dist

    counts, layers = load.peek(), load.layers
    load.clear()
    if counts is not None:
        dist.all_reduce(counts, group=stage)
    return counts, layers


@dataclass(frozen=True, slots=True)
class _Routing:
    """What the layers of a stage did in a step, on all of its ranks."""

    layers: tuple[int, ...]
    rows: list[list[int]]
    """By layer and expert, behind them those dropped."""
    sums: Tensor | None
    """By layer: of each expert's probabilities, and of squared log-sum-exps; where routers have losses."""
    largest_bias: float | None


def balance_fields(stage: Stage, rows: Tensor | None, layers: Sequence[int], topology: Topology) -> dict[str, Any]:
    """Entries of metrics.jsonl on routers and experts; nothing for models without. `rows` as `agreed_rows` gives them. Collective."""
    import torch.distributed as dist

    if not stage.has_experts:
        return {}
    sums = stage.router_losses.take()
    if sums is not None:
        dist.all_reduce(sums, group=topology.stage)
        sums = sums.cpu()
    mine = _Routing(tuple(layers), [] if rows is None else rows.tolist(), sums, stage.router_biases.largest())
    routing = _of_all_stages(mine, topology)
    if not routing.rows:
        return {}
    fields = balance([row[:-1] for row in routing.rows], routing.layers)
    if stage.capacity is not None:
        fields |= drops(routing.rows)
    if routing.largest_bias is not None:
        fields["router_bias"] = routing.largest_bias
    return fields | (losses(routing.sums, routing.rows) if routing.sums is not None else {})


def _of_all_stages(mine: _Routing, topology: Topology) -> _Routing:
    """The layers of all stages, one below the other: some stages may have none with experts."""
    import torch
    import torch.distributed as dist

    if topology.pipeline is None:
        return mine
    stages: list[_Routing] = [mine] * topology.num_stages
    dist.all_gather_object(stages, mine, group=topology.pipeline.column)
    sums = [stage.sums for stage in stages if stage.sums is not None]
    return _Routing(
        tuple(layer for stage in stages for layer in stage.layers),
        [row for stage in stages for row in stage.rows],
        torch.cat(sums) if sums else None,
        max((stage.largest_bias for stage in stages if stage.largest_bias is not None), default=None),
    )


def losses(sums: Tensor, rows: list[list[int]]) -> dict[str, float]:
    """Entries of metrics.jsonl: both losses of routers without their weights, the layers' mean.

    `sums` (L, E + 1): of probabilities, and of squared log-sum-exps; `rows` (L, E + 1): of all ranks, with those dropped.
    """
    import torch

    counts = torch.tensor(rows, dtype=torch.float64)[:, :-1]
    probabilities, squares = sums[:, :-1].double(), sums[:, -1].double()
    shares, tokens = counts / counts.sum(1, keepdim=True).clamp(min=1), probabilities.sum(1, keepdim=True).clamp(min=1)
    even = counts.shape[1] * (shares * probabilities / tokens).sum(1)
    return {"router_balance": float(even.mean()), "router_z": float((squares / tokens.squeeze(1)).mean())}


def balance(counts: list[list[int]], layers: Sequence[int]) -> dict[str, Any]:
    """Entries of metrics.jsonl from rows by layer and expert; `layers`: their numbers.

    `expert_load`: rows of the busiest expert over the mean, in the layer where that is largest; 1.0 is even. `expert_load_layer`: that
    layer. `expert_load_mean`: the layers' mean. `idle_experts`: experts of all layers that no token chose.
    """
    loads = [max(row) * len(row) / max(1, sum(row)) for row in counts]
    worst = max(range(len(loads)), key=loads.__getitem__)
    return {
        "expert_load": loads[worst],
        "expert_load_layer": layers[worst],
        "expert_load_mean": sum(loads) / len(loads),
        "idle_experts": sum(row.count(0) for row in counts),
    }


def drops(counts: list[list[int]]) -> dict[str, Any]:
    """Entries of metrics.jsonl from rows by layer and expert with those dropped behind them: how many of all layers, and their share."""
    dropped, wanted = sum(row[-1] for row in counts), sum(sum(row[:-1]) for row in counts)
    return {"dropped_rows": dropped, "dropped_share": dropped / max(1, wanted)}
