"""`python -m efflaunch.bench.planner --json FILE`: how fast plans are made, how far from the best they can be, and against whom.

Every row is one batch: gpus, sequences, distribution, seed. Modelled seconds are in FlexSP's published cost model (bench/flexsp.py);
no GPU is used. `plan_s_p50` and `plan_s_p99` are over repeats of the same batch in one process with everything loaded, as the plan
service has it; `cold_plan_s` is the very first plan. `gap_inline` is the plan's own gap as it is made; `gap_certificate` is that of
the best plan of the background search (more work, same model) against the better of the two bounds, null where none was asked for;
`gap_certificate_of_inline_plan` is the inline plan's against the same bound.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from ..parallel.sequence.adaptive import adaptive_plan, bounded, default_budget
from ..parallel.sequence.bound import Bound, class_milp_bound
from ..parallel.sequence.cost import CostModel
from ..parallel.sequence.flexsp import FlexspResult, flexsp_plan
from ..parallel.sequence.plan import StepPlan, check_plan
from ..parallel.sequence.solve import solve_adaptive, solve_best_static, solve_greedy
from ..training.data.lengths import DISTRIBUTIONS, open_lengths
from .flexsp import flexsp_a100_7b
from .record import machine, write_json

SIZES = ((64, 512), (64, 2048), (256, 2048), (1024, 4096))
MAX_SEQ_LEN = 384_000
TARGETS = {
    "plan_s_p50 at 64/512": 0.1,
    "plan_s_p99 at 64/512": 0.25,
    "plan_s_p50 at 1024/4096": 1.0,
    "median gap_inline": 0.05,
    "median gap_certificate": 0.03,
    "mean speedup_vs_flexsp at 256": 1.05,
}
PAPER = {"github": 1.26, "commoncrawl": 1.42, "wikipedia": 1.46}
"""FlexSP over DeepSpeed's static plan, 7B/384K on 64 GPUs, as published."""


def main(arguments: list[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    rows: list[dict[str, Any]] = []
    started = time.perf_counter()
    solve_adaptive(np.arange(1, 513).tolist(), flexsp_a100_7b(64))
    result = {"benchmark": "planner", **machine(), "cold_plan_s": time.perf_counter() - started, "rows": rows}
    for gpus, sequences, name, seed in _cases(options):
        rows.append(row(gpus, sequences, name, seed, options))
        write_json(options.json, result | {"summary": summary(rows), "targets": TARGETS})
        print(_line(rows[-1]), flush=True)
    print("\n".join(f"{key}: {value:.4g}" for key, value in summary(rows).items() if isinstance(value, float)))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m efflaunch.bench.planner", description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--json", type=Path, required=True, help="where the result goes, after every batch")
    parser.add_argument("--sizes", nargs="*", default=[f"{g}/{k}" for g, k in SIZES], metavar="GPUS/SEQUENCES")
    parser.add_argument("--distributions", nargs="*", default=list(DISTRIBUTIONS))
    parser.add_argument("--lengths", type=str, help="a file of lengths, or a corpus PREFIX.idx: one distribution more")
    parser.add_argument("--seeds", type=int, default=6)
    parser.add_argument("--repeats", type=int, default=10, help="plans timed per batch")
    parser.add_argument("--certificate-s", type=float, default=20.0, help="limit of the class MILP; 0: no certificate")
    parser.add_argument("--certificate-seeds", type=int, default=6)
    parser.add_argument("--flexsp-seeds", type=int, default=1, help="0: FlexSP is left out")
    parser.add_argument("--flexsp-sizes", nargs="*", default=["64/512", "256/2048"], metavar="GPUS/SEQUENCES", help="FlexSP plans these")
    parser.add_argument("--flexsp-s", type=float, default=10.0, help="limit of one of FlexSP's programs")
    parser.add_argument("--flexsp-tries", type=int, default=2, help="numbers of micro-batches FlexSP tries")
    return parser


def _cases(options: argparse.Namespace) -> Iterator[tuple[int, int, str, int]]:
    names = [*options.distributions, *([options.lengths] if options.lengths else [])]
    for size in options.sizes:
        gpus, sequences = (int(part) for part in size.split("/"))
        for name in names:
            for seed in range(options.seeds):
                yield gpus, sequences, name, seed


def row(gpus: int, sequences: int, name: str, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    """Plan one batch with every planner, and compare."""
    cost = flexsp_a100_7b(gpus)
    lengths = open_lengths(name, max_seq_len=MAX_SEQ_LEN).draw(sequences, seed).tolist()
    plan, wall, processor = timed(lengths, cost, options.repeats)
    check_plan(plan)
    ours = cost.plan_s(plan)
    greedy, static = (cost.plan_s(solve(lengths, cost)) for solve in (solve_greedy, solve_best_static))
    flexsp = _flexsp(lengths, cost, options) if seed < options.flexsp_seeds and f"{gpus}/{sequences}" in options.flexsp_sizes else None
    certified = certificate(lengths, cost, plan, options.certificate_s) if seed < options.certificate_seeds else None
    return {
        "gpus": gpus,
        "sequences": sequences,
        "distribution": name,
        "seed": seed,
        "plan_s_p50": float(np.percentile(wall, 50)),
        "plan_s_p99": float(np.percentile(wall, 99)),
        "plan_cpu_s_p50": float(np.percentile(processor, 50)),
        "load_average": os.getloadavg()[0],
        "modelled_s": ours,
        "micro_batches": len(plan.micro_batches),
        "gap_inline": plan.gap,
        "bound_inline": plan.bound,
        **(certified or {"gap_certificate": None}),
        "speedup_vs_static": static / ours,
        "speedup_vs_greedy": greedy / ours,
        "speedup_vs_flexsp": cost.plan_s(flexsp.plan) / ours if flexsp else None,
        **(_flexsp_row(flexsp, lengths, cost) if flexsp else {}),
    }


def timed(lengths: list[int], cost: CostModel, repeats: int) -> tuple[StepPlan, list[float], list[float]]:
    """The plan, and wall and processor seconds of each time it is made; AssertionError if it ever differs."""
    plans, wall, processor = [], [], []
    for _ in range(repeats):
        started, spent = time.perf_counter(), time.process_time()
        plans.append(solve_adaptive(lengths, cost))
        wall.append(time.perf_counter() - started)
        processor.append(time.process_time() - spent)
    assert all(plan == plans[0] for plan in plans), "the same batch was planned in two ways"
    return plans[0], wall, processor


def certificate(lengths: list[int], cost: CostModel, plan: StepPlan, limit_s: float) -> dict[str, Any] | None:
    """Run what the background planner does: a better plan by ten times the work, and the class MILP's bound for it."""
    if limit_s <= 0:
        return None
    started = time.perf_counter()
    better = adaptive_plan(lengths, cost, budget=10 * default_budget(len(lengths)))
    best = better if cost.plan_s(better) < cost.plan_s(plan) else plan
    searched = time.perf_counter() - started
    proved = bounded(best, class_milp_bound(lengths, cost, plan_s=cost.plan_s(best), time_limit_s=limit_s))
    of_inline = bounded(plan, _bound_of(proved))
    return {
        "gap_certificate": proved.gap,
        "gap_certificate_of_inline_plan": of_inline.gap,
        "bound_certificate": proved.bound,
        "background_modelled_s": cost.plan_s(best),
        "background_search_s": searched,
        "background_bound_s": time.perf_counter() - started - searched,
    }


def _bound_of(plan: StepPlan) -> Bound:
    """The bound a plan carries, to give it to another plan of the same lengths."""
    return Bound(plan.lower_bound_s or 0.0, plan.bound, plan.lower_bound_s is not None)


def _flexsp(lengths: list[int], cost: CostModel, options: argparse.Namespace) -> FlexspResult:
    solved = flexsp_plan(lengths, cost, time_limit_s=options.flexsp_s, tries=options.flexsp_tries)
    check_plan(solved.plan)
    return solved


def _flexsp_row(solved: FlexspResult, lengths: list[int], cost: CostModel) -> dict[str, Any]:
    """Compare also with groups of 64: what 384K positions need in the paper's static baseline, whatever this batch needs."""
    widest = cost.plan_s(solve_best_static(lengths, replace(cost, degrees=cost.degrees[-1:])))
    return {
        "flexsp_over_static": widest / cost.plan_s(solved.plan),
        "flexsp_wall_s": solved.wall_s,
        "flexsp_programs": solved.programs,
        "flexsp_timeouts": solved.timeouts,
        "flexsp_from_warm_start": solved.from_warm_start,
    }


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The figures of the targets; None where no row speaks of them."""

    def of(key: str, gpus: int | None = None, sequences: int | None = None) -> list[float]:
        kept = [r for r in rows if gpus in (None, r["gpus"]) and sequences in (None, r["sequences"])]
        return [float(r[key]) for r in kept if r.get(key) is not None]

    def by(function: Any, values: list[float]) -> float | None:
        return float(function(values)) if values else None

    flexsp = {name: [r["flexsp_over_static"] for r in rows if r["distribution"] == name and r.get("flexsp_over_static")] for name in PAPER}
    return {
        "plan_s_p50 at 64/512": by(statistics.median, of("plan_s_p50", 64, 512)),
        "plan_s_p99 at 64/512": by(max, of("plan_s_p99", 64, 512)),
        "plan_s_p50 at 1024/4096": by(statistics.median, of("plan_s_p50", 1024)),
        "median gap_inline": by(statistics.median, of("gap_inline")),
        "median gap_certificate": by(statistics.median, of("gap_certificate")),
        "mean speedup_vs_static": by(statistics.fmean, of("speedup_vs_static")),
        "mean speedup_vs_greedy": by(statistics.fmean, of("speedup_vs_greedy")),
        "least speedup_vs_greedy": by(min, of("speedup_vs_greedy")),
        "least speedup_vs_flexsp": by(min, of("speedup_vs_flexsp")),
        "mean speedup_vs_flexsp at 64": by(statistics.fmean, of("speedup_vs_flexsp", 64)),
        "mean speedup_vs_flexsp at 256": by(statistics.fmean, of("speedup_vs_flexsp", 256)),
        "FlexSP over static, mean": {name: by(statistics.fmean, values) for name, values in flexsp.items()},
        "FlexSP over static, published": PAPER,
    }


def _line(r: dict[str, Any]) -> str:
    certified = "-" if r["gap_certificate"] is None else f"{r['gap_certificate']:.1%}"
    flexsp = "-" if r["speedup_vs_flexsp"] is None else f"{r['speedup_vs_flexsp']:.3f}"
    batch = f"{r['gpus']:5}/{r['sequences']:<5} {Path(r['distribution']).name:12} seed {r['seed']}"
    return (
        f"{batch}  {1e3 * r['plan_s_p50']:6.0f} ms  gap {r['gap_inline']:.1%} / {certified}"
        f"  static {r['speedup_vs_static']:.3f}  greedy {r['speedup_vs_greedy']:.3f}  FlexSP {flexsp}"
    )


if __name__ == "__main__":
    raise SystemExit(main())
