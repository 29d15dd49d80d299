"""Pipelines on real gloo ranks, against the simulation and against torch's own: what bench/pipeline.py measures.

`throttled`: every order that runs, executed by the product's own actions and links on ranks that sleep in place of computing; the seconds
of a step against those of parallel/pipeline/simulate.py. Micro-batches are unequal. Computing is only sleeping, so the machine's load
matters little, and nothing is said about how fast any model is.

`against_torch`: a small Llama in two stages of one rank, forward and backward of a step: ours (recomputing nothing) over
torch.distributed.pipelining's Schedule1F1B on Hugging Face's layers, in turns on the same ranks. `equal`: micro-batches of one length.
`padded`: unequal ones, which torch's pads to the longest, for its stages have one shape.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..parallel.pipeline.config import PipelineOrder
from ..parallel.pipeline.pipeline_plan import ActionKind, Unit, UnitKind
from ..parallel.pipeline.simulate import costs, simulate
from ..parallel.pipeline.step_actions import step_actions, step_schedule
from .ranks import on_fresh_ranks

if TYPE_CHECKING:
    from torch import Tensor

    from ..parallel.pipeline.links import StageLinks

ORDERS = {
    "1f1b": (PipelineOrder.ONE_F_ONE_B, 1),
    "gpipe": (PipelineOrder.GPIPE, 1),
    "interleaved": (PipelineOrder.INTERLEAVED, 2),
    "zero_bubble": (PipelineOrder.ZERO_BUBBLE, 1),
}
AIM = 0.05
"""Largest error aimed for."""


def throttled(ranks: int, micro_batches: int, unit_s: float, rounds: int) -> dict[str, Any]:
    """Rows (order, predicted_s, measured_s: the fastest of `rounds`) and `worst_error`, the largest |measured / predicted - 1|."""
    rows = on_fresh_ranks(_sleeping_rank, ranks, micro_batches, unit_s, rounds)["rows"]
    worst = max(abs(row["measured_s"] / row["predicted_s"] - 1) for row in rows)
    return {"ranks": ranks, "micro_batches": micro_batches, "unit_s": unit_s, "aim": AIM, "rows": rows, "worst_error": worst}


def against_torch(tokens: int, kind: str, rounds: int) -> dict[str, Any]:
    """Seconds of each round, and `speed_over_torch`: the median over rounds of torch's time over ours."""
    from .peers.torch_pipeline import compete

    return on_fresh_ranks(compete, 2, tokens, kind, rounds)


def seconds_of(micro_batches: int, unit_s: float) -> list[float]:
    """Seconds of each micro-batch's forward pass through a whole rank: the longest four times the shortest, `unit_s` in the mean."""
    shares = [1 + 3 * ((7 * number) % micro_batches) / max(1, micro_batches - 1) for number in range(micro_batches)]
    return [unit_s * share * micro_batches / sum(shares) for share in shares]


def _sleeping_rank(rank: int, ranks: int, store: Path, micro_batches: int, unit_s: float, rounds: int, results: Any) -> None:
    import torch
    import torch.distributed as dist

    from ..parallel.pipeline.links import StageLinks
    from ..parallel.pipeline.place import StagePlace
    from ..parallel.topology import build_topology

    dist.init_process_group("gloo", store=dist.FileStore(str(store), ranks), rank=rank, world_size=ranks)
    topology, rows, forward = build_topology(replicate=1, device="cpu", stages=ranks), [], seconds_of(micro_batches, unit_s)
    assert topology.pipeline is not None
    for name, (order, virtual) in ORDERS.items():
        place = StagePlace(tuple(range(part, part + 1) for part in range(virtual)), rank, topology.pipeline)
        links = StageLinks(place, 64, torch.float32, torch.device("cpu"), lambda what: None)
        shape = ranks * virtual, micro_batches, 1
        each = [[second / virtual] for second in forward]
        made = costs(shape, forward_s=[each] * shape[0], backward_s=[each] * shape[0], weight_s=[each] * shape[0])
        predicted = simulate(step_schedule(order, ranks, virtual, micro_batches, micro_batches), made).step_s
        measured = min(_step(order, virtual, links, [second[0] for second in each]) for _ in range(rounds))
        rows.append({"order": name, "predicted_s": predicted, "measured_s": measured})
    dist.barrier()
    if rank == 0:
        results.put({"rows": rows})
    dist.destroy_process_group()


def _step(order: PipelineOrder, virtual: int, links: StageLinks, forward_s: list[float]) -> float:
    """Seconds of one step of sleeping units, on the slowest rank; AssertionError where a message is not the one that was sent."""
    import torch
    import torch.distributed as dist

    place = links.place
    made: dict[Unit, Tensor] = {}
    dist.barrier()
    begun = time.perf_counter()
    actions = step_actions(order, place.num_ranks, virtual, len(forward_s), len(forward_s))[place.index]
    apart = any(action.unit.kind is UnitKind.WEIGHT for action in actions)
    for action in actions:
        unit = action.unit
        if action.peer is not None and action.kind is ActionKind.RECEIVE:
            links.post(unit, action.peer, 4)
        elif action.peer is not None:
            links.send(unit, action.peer, made.pop(unit))
        else:
            _check(unit, links)
            # Gradients of inputs and of weights take as long as forward, each.
            time.sleep(forward_s[unit.micro_batch] * (2 if unit.kind is UnitKind.BACKWARD and not apart else 1))
            made[unit] = torch.full((4, 64), float(_name(unit)))
    links.finish()
    took = torch.tensor(time.perf_counter() - begun, dtype=torch.float64)
    dist.all_reduce(took, dist.ReduceOp.MAX)
    return float(took)


def _check(unit: Unit, links: StageLinks) -> None:
    """Take what the unit needs from another rank, and see that it is what that unit made."""
    step = -1 if unit.kind is UnitKind.FORWARD else 1
    if unit.kind is UnitKind.WEIGHT or not 0 <= unit.stage + step < links.place.num_stages:
        return
    sender = Unit(unit.kind, unit.stage + step, unit.micro_batch)
    assert bool((links.take(sender, 4) == _name(sender)).all()), f"{unit} got something else than what {sender} made"
    if unit.kind is UnitKind.BACKWARD:
        links.release(unit.with_kind(UnitKind.FORWARD))


def _name(unit: Unit) -> int:
    return 1000 * unit.stage + 2 * unit.micro_batch + (unit.kind is UnitKind.BACKWARD)



