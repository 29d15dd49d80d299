"""`python -m efflaunch.bench.experts_throttled --json FILE`: planned schedules of experts on real gloo ranks with throttled links.

Every stream of a plan is a thread that runs its order: it waits for what a task needs, sleeps for the seconds of the cost model (times
`--scale`, without contention), and makes the task's real collective on the group of its links, with a few numbers instead of rows.
Computing is only sleeping, so the machine's load matters little. What is tested is the plan: ranks that execute it meet in the same
collectives in the same order, each receives what the others sent under the same task, every gradient is reduced exactly once, and the
step takes about what the simulation says. Nothing is said about how fast any network or model is.

Headline keys: `worst_error`, the largest |measured / predicted - 1| of the schedules, and `inverted_pairs`, pairs of schedules whose
order in measured time is not that in predicted time.
"""

from __future__ import annotations

import argparse
import itertools
import threading
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..parallel.experts.cost import IDEAL, ExpertLayer, LayerCost, Operator
from ..parallel.experts.plan import ExpertSchedule, PhasePlan, Task
from ..parallel.experts.recipe import prepare
from ..parallel.experts.simulate import seconds_of, simulate
from ..parallel.experts.solve import best, candidates, schedule
from ..parallel.experts.testbeds import TESTBEDS
from ..utils.helper_thread import HelperThread, ends_with_helpers, print_death
from .ranks import on_fresh_ranks
from .record import machine, write_json

if TYPE_CHECKING:
    import torch

LAYER = ExpertLayer(batch=2, tokens=1024, hidden=2048, ffn=4 * 2048, heads=16, capacity=1.2)
SCHEDULES = ("sequential", "tutel", "fsmoe", "flowmoe", "ours")
AIM = 0.07
"""Largest error aimed for."""
ELEMENTS_OF_ONE = 1024
"""Gradients that one number stands for."""


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m efflaunch.bench.experts_throttled", description=__doc__.splitlines()[0] if __doc__ else None
    )
    parser.add_argument("--json", type=Path, required=True, help="where the result goes")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--layers", type=int, default=2, help="equal layers in a row")
    parser.add_argument("--scale", type=float, default=20.0, help="seconds of a throttled link for one of the cost model")
    parser.add_argument("--rounds", type=int, default=3, help="of which the fastest counts: what disturbs a round is not the plan's")
    options, origin = parser.parse_args(arguments), machine()
    figures = on_fresh_ranks(_rank_main, options.ranks, options.layers, options.scale, options.rounds)
    sizes = {"ranks": options.ranks, "layers": options.layers, "scale": options.scale, "rounds": options.rounds}
    result = {"benchmark": "experts_throttled", **origin, **sizes, "aim": AIM, **figures, **summary(figures["rows"])}
    write_json(options.json, result)
    for row in result["rows"]:
        print(f"{row['schedule']:12} predicted {row['predicted_s']:.2f} s, measured {row['measured_s']:.2f} s")
    print(f"worst error {result['worst_error']:.1%}, inverted pairs {result['inverted_pairs']}")
    return 0


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The headline figures."""
    inverted = [
        (one["schedule"], other["schedule"])
        for one, other in itertools.combinations(rows, 2)
        if (one["predicted_s"] - other["predicted_s"]) * (one["measured_s"] - other["measured_s"]) < 0
    ]
    return {"worst_error": max(abs(row["measured_s"] / row["predicted_s"] - 1) for row in rows), "inverted_pairs": inverted}


def _rank_main(rank: int, ranks: int, store: Path, layers: int, scale: float, rounds: int, results: Any) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=ranks)
    # Streams of links are threads of their own: each has a group of its own.
    groups = [dist.new_group(list(range(ranks))) for _ in range(3)]
    cost = TESTBEDS["B"].cost(LAYER)
    plans = planned(cost, layers)
    digests: list[Any] = [None] * ranks
    dist.all_gather_object(digests, [plan.digest for plan in plans.values()], group=groups[0])
    assert all(digest == digests[0] for digest in digests), "ranks have different schedules"
    seconds: dict[str, list[float]] = {name: [] for name in plans}
    with ends_with_helpers(print_death):
        for _ in range(rounds):
            for name, plan in plans.items():
                dist.barrier(group=groups[0])
                seconds[name].append(sum(execute(phase, cost, scale, groups) for phase in (plan.forward, plan.backward)))
    if rank == 0:
        results.put({"rows": [_row(name, plan, cost, scale, min(seconds[name])) for name, plan in plans.items()]})
    dist.barrier(group=groups[0])
    dist.destroy_process_group()


def planned(cost: LayerCost, layers: int) -> dict[str, ExpertSchedule]:
    """The schedules that are executed, by scheduler."""
    prepared = prepare(cost, IDEAL, layers)
    choices = candidates(prepared)
    choices["ours"] = best(choices.values())
    return {name: schedule(choices[name], prepared) for name in SCHEDULES}


def _row(name: str, plan: ExpertSchedule, cost: LayerCost, scale: float, measured_s: float) -> dict[str, Any]:
    simulated = sum(simulate(phase, cost, IDEAL).seconds for phase in (plan.forward, plan.backward))
    tasks = len(plan.forward.tasks) + len(plan.backward.tasks)
    return {"schedule": name, "tasks": tasks, "predicted_s": scale * simulated, "measured_s": measured_s}


def execute(plan: PhasePlan, cost: LayerCost, scale: float, groups: list[Any]) -> float:
    """Run a phase on this rank, and return its seconds. Collective; AssertionError where ranks or gradients do not match."""
    import torch
    import torch.distributed as dist

    sleeps = [scale * one for one in seconds_of(plan, cost)]
    done = [threading.Event() for _ in plan.tasks]
    rank, ranks = dist.get_rank(groups[0]), dist.get_world_size(groups[0])
    gradient = torch.full((plan.layers * plan.gradient_elements // ELEMENTS_OF_ONE + 1,), float(rank + 1))

    def run(stream: int) -> None:
        for number in plan.orders[stream]:
            for need in plan.tasks[number].needs:
                done[need].wait()
            time.sleep(sleeps[number])
            communicate(plan.tasks[number], number, gradient, groups[stream])
            done[number].set()

    threads = [HelperThread(partial(run, stream), f"stream-{stream}") for stream in range(len(plan.orders))]
    began = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    seconds = time.perf_counter() - began
    if plan.pieces:
        assert torch.equal(gradient[:-1], torch.full_like(gradient[:-1], ranks * (ranks + 1) / 2)), "a gradient is not reduced exactly once"
    return seconds


def communicate(task: Task, number: int, gradient: torch.Tensor, group: Any) -> None:
    """The collective of a task; what comes from every rank is the task's number, or its piece of the gradient."""
    import torch
    import torch.distributed as dist

    ranks = dist.get_world_size(group)
    mine, received = torch.full((ranks,), float(number)), torch.empty(ranks)
    expected = mine
    if task.operator is Operator.REDUCE:
        low, high = task.first_element // ELEMENTS_OF_ONE, (task.first_element + task.elements) // ELEMENTS_OF_ONE
        dist.all_reduce(gradient[low:high], group=group)
        return
    if task.operator in (Operator.DISPATCH, Operator.COMBINE):
        dist.all_to_all_single(received, mine, group=group)
    elif task.operator in (Operator.EXPERT_GATHER, Operator.ATTENTION_GATHER):
        dist.all_gather(list(received.split(1)), mine[:1], group=group)
    elif task.operator in (Operator.EXPERT_SCATTER, Operator.ATTENTION_SCATTER):
        received, expected = received[:1], ranks * mine[:1]
        dist.reduce_scatter(received, list(mine.split(1)), group=group)
    else:
        return
    assert torch.equal(received, expected), f"task {number} met another one: {received.tolist()}"


if __name__ == "__main__":
    raise SystemExit(main())
