"""`python -m efflaunch.bench.adaptive --json FILE`: adaptive plans against every static degree, on real ranks and documents.

Four gloo ranks train the quickstart's model on the built-in corpus. The machine is profiled first, for a short time, and the
plans are made with that profile. Every round takes one step's documents and runs each contestant's plan of them once, in turning
order, so that a slow moment of the machine hits all, twice, and the faster run counts; seconds are those of the step's gradients,
wall time, on the slowest rank. Processor seconds of all ranks are recorded beside them: on a busy machine they tell work from waiting.
All contestants run the same loss, and a difference beyond rounding stops the benchmark.

Headline keys: `speedup_vs_best_static`, the static degree with the lowest mean over adaptive's (means of the same steps);
`prediction_error`, the mean over groups of |modelled / measured - 1|, and `step_prediction_error` of whole steps.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from .ranks import on_fresh_ranks
from .record import machine, write_json

OVERRIDES = (
    "+experiment=quickstart",
    "model.num_layers=2",
    "data.max_seq_len=4K",
    "data.global_batch_tokens=16K",
    "parallel.tokens_per_rank=4K",
)
"""Every degree can hold the longest sequence, so that all static degrees can take part."""


def main(arguments: list[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    figures = measure((*OVERRIDES, *options.overrides), rounds=options.rounds, seconds=options.seconds)
    write_json(options.json, {"benchmark": "adaptive", **machine(), **figures})
    headline = "  ".join(f"{key} {figures[key]:.3f}" for key in ("speedup_vs_best_static", "prediction_error"))
    print(f"{headline}  -> {options.json}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m efflaunch.bench.adaptive", description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("overrides", nargs="*", help="changes to the quickstart, as data.global_batch_tokens=32K")
    parser.add_argument("--json", type=Path, required=True, help="where the result goes")
    parser.add_argument("--rounds", type=int, default=8, help="steps of the run")
    parser.add_argument("--seconds", type=float, default=45.0, help="about how long the profile may take")
    return parser


def measure(overrides: tuple[str, ...], *, rounds: int, seconds: float) -> dict[str, Any]:
    """The whole benchmark on fresh processes; the result is rank 0's."""
    from ..launcher.config.compose import compose

    config = compose(list(overrides))
    ranks = config.cluster.ranks_per_node
    figures = on_fresh_ranks(_rank_main, ranks, config, rounds, seconds)
    return {"overrides": list(overrides), "ranks": ranks, "rounds": rounds, **figures}


def _rank_main(rank: int, ranks: int, store: Path, config: Any, rounds: int, seconds: float, results: Any) -> None:
    import torch
    import torch.distributed as dist

    os.environ.update(RANK=str(rank), WORLD_SIZE=str(ranks), LOCAL_RANK=str(rank))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=ranks)
    figures = _Bench(config, seconds).run(rounds)
    if rank == 0:
        results.put(figures)
    dist.barrier()
    dist.destroy_process_group()


class _Bench:
    """One rank's side of the benchmark: its model, its planner and its measured steps."""

    def __init__(self, config: Any, seconds: float) -> None:
        import torch

        from ..training.data.source import open_data
        from ..training.profiling.probe import Prober

        self.prober = Prober.of(config, torch.device("cpu"))
        self.profile = self.prober.profile(seconds)
        self.source = open_data(config.data, config.train.seed, self.prober.spec.vocab_size)
        self.cost = self._same_everywhere(self.profile.refine(self.prober.cost))

    def _same_everywhere(self, cost: Any) -> Any:
        """Rank 0's: measured times differ a little between ranks."""
        import torch.distributed as dist

        payload = [cost]
        dist.broadcast_object_list(payload, 0)
        return payload[0]

    def _sum(self, value: float) -> float:
        import torch
        import torch.distributed as dist

        total = torch.tensor(value, dtype=torch.float64)
        dist.all_reduce(total)
        return float(total)

    def run(self, rounds: int) -> dict[str, Any]:
        steps = [self._round(step) for step in range(rounds)]
        return {
            "profile": asdict(self.profile),
            **summary(steps),
            "steps": steps,
        }

    def _plans(self, step: int) -> tuple[dict[str, Any], float]:
        from ..parallel.sequence.solve import solve_adaptive, solve_greedy, solve_static

        lengths = self.source.lengths(step)
        begun = time.perf_counter()
        plans = {"adaptive": solve_adaptive(lengths, self.cost)}
        plan_s = time.perf_counter() - begun
        plans["greedy"] = solve_greedy(lengths, self.cost)
        for degree in self.cost.degrees:
            static = solve_static(
                lengths,
                world_size=self.cost.world_size,
                degree=degree.degree,
                ulysses=degree.ulysses,
                tokens_per_rank=self.cost.tokens_per_rank,
                linear_cost_tokens=degree.linear_s / degree.attention_s if degree.attention_s else 0.0,
            )
            plans[f"static {degree.degree}"] = self.cost.priced(static)
        return plans, plan_s

    def _round(self, step: int) -> dict[str, Any]:
        """Every contestant's plan of the step's documents, once."""
        plans, plan_s = self._plans(step)
        names = list(plans)
        turn = step % len(names)
        rows: dict[str, Any] = {}
        losses: dict[str, float] = {}
        for name in (names[turn:] + names[:turn]) * 2:
            row, losses[name] = self._measured(step, plans[name])
            if name not in rows or row["measured_s"] < rows[name]["measured_s"]:
                rows[name] = row
        if max(losses.values()) - min(losses.values()) > 1e-4 * max(losses.values()):
            raise RuntimeError(f"plans of step {step} do not compute the same loss: {losses}")
        return {"sequences": len(self.source.lengths(step)), "longest": max(self.source.lengths(step)), "plan_s": plan_s, "plans": rows}

    def _measured(self, step: int, plan: Any) -> tuple[dict[str, Any], float]:
        from ..training.micro_batches import read_step
        from ..training.reporting.predicted_vs_measured import StepTimes, bubble, group_rows

        works = read_step(self.source, step, plan, self.prober.topology.rank)
        used = time.process_time()
        run = self.prober.run(works, num_targets=self.source.num_target_tokens(step))
        processor_s = self._sum(time.process_time() - used)
        times = StepTimes(run.busy_s, run.wall_s, run.wall_s)
        groups = [
            {"degree": row["degree"], "predicted_s": row["predicted_s"], "measured_s": row["measured_s"]}
            for row in group_rows(plan, times, self.profile.overhead_s)
        ]
        row = {
            "plan": str(plan),
            "source": plan.source,
            # step_s of the model is the optimizer and the reduction; only the latter is in the measured time.
            "predicted_s": plan.predicted_s - self.profile.step_s + self.profile.reduce_s,
            "measured_s": run.wall_s,
            "processor_s": processor_s,
            "gap": plan.gap,
            "bubble": bubble(plan, times, barrier_free=False),
            "groups": groups,
        }
        return row, run.loss


def summary(steps: list[dict[str, Any]]) -> dict[str, Any]:
    """Means over the steps, who is how much faster, and how far the model was off."""
    names = list(steps[0]["plans"])
    rows = [
        {
            "plan": name,
            "step_s": statistics.mean(step["plans"][name]["measured_s"] for step in steps),
            "predicted_s": statistics.mean(step["plans"][name]["predicted_s"] for step in steps),
            "processor_s": statistics.mean(step["plans"][name]["processor_s"] for step in steps),
            "bubble": statistics.mean(step["plans"][name]["bubble"] for step in steps),
        }
        for name in sorted(names)
    ]
    by_name = {row["plan"]: row for row in rows}
    static = [row for row in rows if row["plan"].startswith("static")]
    best = min(static, key=lambda row: row["step_s"])
    best_modelled = min(static, key=lambda row: row["predicted_s"])
    adaptive = by_name["adaptive"]
    groups = [group for step in steps for plan in step["plans"].values() for group in plan["groups"]]
    degrees = sorted({group["degree"] for group in groups})
    return {
        "rows": rows,
        "best_static": best["plan"],
        "speedup_vs_best_static": best["step_s"] / adaptive["step_s"],
        "speedup_vs_best_static_modelled": best_modelled["predicted_s"] / adaptive["predicted_s"],
        "speedups": {row["plan"]: row["step_s"] / adaptive["step_s"] for row in rows if row is not adaptive},
        "prediction_error": _error(groups),
        "prediction_error_by_degree": {str(degree): _error([row for row in groups if row["degree"] == degree]) for degree in degrees},
        "step_prediction_error": _error([plan for step in steps for plan in step["plans"].values()]),
        "measured_over_predicted": statistics.median(
            plan["measured_s"] / plan["predicted_s"] for step in steps for plan in step["plans"].values()
        ),
        "plan_s": statistics.median(step["plan_s"] for step in steps),
    }


def _error(rows: list[dict[str, Any]]) -> float:
    return statistics.mean(abs(row["predicted_s"] / row["measured_s"] - 1) for row in rows)


if __name__ == "__main__":
    raise SystemExit(main())
