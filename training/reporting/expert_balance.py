"""How evenly the experts of each layer are used in a step, over all ranks: what metrics and the live display show."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor
    from torch.distributed import ProcessGroup

    from ...memory.executor.mixture import ExpertLoad
    from ...model.stage import Stage


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


def balance_fields(stage: Stage, rows: Tensor | None, layers: Sequence[int], ranks: ProcessGroup) -> dict[str, Any]:
    """Entries of metrics.jsonl on routers and experts; nothing for models without. `rows` as `agreed_rows` gives them. Collective."""
    if rows is None:
        return {}
    fields = balance(rows[:, :-1].tolist(), layers)
    if stage.capacity is not None:
        fields |= drops(rows.tolist())
    largest = stage.router_biases.largest()
    return fields | agreed_losses(stage.router_losses.take(), rows[:, :-1], ranks) | ({} if largest is None else {"router_bias": largest})


def agreed_losses(sums: Tensor | None, counts: Tensor, stage: ProcessGroup) -> dict[str, float]:
    """Entries of metrics.jsonl: both losses of routers without their weights, the layers' mean. Collective over `stage`.

    `sums` (L, E + 1): of probabilities, and of squared log-sum-exps; `counts` (L, E): rows of all ranks.
    """
    import torch.distributed as dist

    if sums is None:
        return {}
    dist.all_reduce(sums, group=stage)
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
