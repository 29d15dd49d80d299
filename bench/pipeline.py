"""Schedules of pipelines in the cost model: GPipe's table, a 70B model on 512K and 2M tokens, and how long the search takes.

Everything under `simulated` is seconds of the cost model (parallel/pipeline/simulate.py), but `search`, which is processor time of this
machine. `published` holds what papers measured on their machines, to stand beside it. `predicted_vs_measured`, `vs_torch_equal` and
`vs_torch_padded` are of pipelines that run on gloo ranks (bench/pipeline_ranks.py); with `--ranks 0` they are null.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..errors import PlanError
from ..estimate.pipeline_work import pipeline_model
from ..estimate.plan_inputs import PlanInputs
from ..parallel.pipeline.generators import gpipe
from ..parallel.pipeline.partition import GIB
from ..parallel.pipeline.simulate import costs, simulate
from ..parallel.pipeline.solve import PipelineProblem, Trial, candidates, solve, try_candidate
from ..parallel.pipeline.work import Batch
from .pipeline_ranks import against_torch, throttled
from .record import machine, write_json

EXPERIMENT = "+experiment=llama70b_512k"
GPUS = 256
STEP_TOKENS = 4 << 20
LENGTHS = (512 << 10, 2048 << 10)
STAGES = (4, 8, 16)
MICRO_BATCHES, UNIT_S, TOKENS = 8, 0.05, 512
"""Of pipelines that run: micro-batches, seconds a forward pass of mean length sleeps, tokens of the small Llama's longest one."""
SLICES = (1, 2, 4, 8, 16, 32)
TABLE = {
    2: {1: (1.0, 1.0), 4: (1.07, 1.7), 32: (1.21, 1.8)},
    4: {1: (1.13, 1.07), 4: (1.26, 3.2), 32: (1.84, 3.4)},
    8: {1: (1.38, 1.3), 4: (1.72, 4.8), 32: (3.48, 6.3)},
}
"""GPipe's throughput over its own with 2 stages and 1 micro-batch, as published: AmoebaNet-D and Transformer-48."""
PUBLISHED = {
    "SlimPipe (arXiv 2504.14519)": "Llama 70B: 1.57 x the MFU of other systems at 512K tokens; above 45 % MFU at 2048K on 256 Hopper GPUs",
    "Seq1F1B (arXiv 2406.03488)": "1.14 x the throughput of Megatron's 1F1B, half its memory; 30B at 64K on 64 A100, nothing recomputed",
}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m efflaunch.bench.pipeline", description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--json", type=Path, required=True, metavar="FILE", help="where the result goes")
    parser.add_argument("--lengths", type=int, nargs="*", default=list(LENGTHS), metavar="TOKENS", help="of the long sequences")
    parser.add_argument("--stages", type=int, nargs="*", default=list(STAGES), help="pipeline ranks, divisors of 256")
    parser.add_argument("--search", default="16/64", metavar="STAGES/MICRO_BATCHES", help="what is searched for")
    parser.add_argument("--ranks", type=int, default=4, help="gloo ranks of the pipelines that run; 0: none does")
    parser.add_argument("--rounds", type=int, default=5, help="of each pipeline that runs")
    options = parser.parse_args(arguments)
    stages, _, batches = options.search.partition("/")
    if not (stages.isdecimal() and batches.isdecimal() and int(stages) > 0 and int(batches) > 0):
        parser.error(f"--search {options.search}: expected such as 16/64")
    if any(number < 1 or GPUS % number for number in options.stages) or any(not 1 <= length <= STEP_TOKENS for length in options.lengths):
        parser.error(f"--stages must divide {GPUS}, --lengths be {STEP_TOKENS} tokens at most")
    simulated = {
        "gpipe_table": gpipe_table(),
        "long_context": [row for length in options.lengths for count in options.stages for row in long_context(length, count)],
        "search": list(search(int(stages), int(batches))),
    }
    measured = _measured(options.ranks, options.rounds)
    result = {"benchmark": "pipeline", **machine(), **measured, "simulated": simulated, "published": PUBLISHED}
    result["summary"] = summary(simulated["long_context"])
    write_json(options.json, result)
    print("\n".join(f"{key}: {value}" for key, value in result["summary"].items()))
    return 0


def _measured(ranks: int, rounds: int) -> dict[str, Any]:
    """What needs ranks: pipelines that sleep, on so many of them, and a small Llama's two stages against torch's."""
    if not ranks:
        return {"predicted_vs_measured": None, "vs_torch_equal": None, "vs_torch_padded": None}
    predicted = throttled(ranks, MICRO_BATCHES, UNIT_S, rounds)
    equal, padded = (against_torch(TOKENS, kind, rounds) for kind in ("equal", "padded"))
    return {"predicted_vs_measured": predicted, "vs_torch_equal": equal, "vs_torch_padded": padded}


def gpipe_table() -> list[dict[str, Any]]:
    """GPipe with equal stages and re-materialisation: throughput over that of 2 stages and 1 micro-batch, beside what was published."""

    def step_s(stages: int, batches: int) -> float:
        one = 1 / (stages * batches)
        shape = stages, batches, 1
        return simulate(gpipe(stages, batches), costs(shape, forward_s=one, backward_s=2 * one, weight_s=one)).step_s

    rows = []
    for stages, by_batches in TABLE.items():
        for batches, (amoebanet, transformer) in by_batches.items():
            speed, bubble = step_s(2, 1) / step_s(stages, batches), (stages - 1) / (batches + stages - 1)
            row = {"stages": stages, "micro_batches": batches, "throughput": speed, "bubble": bubble}
            rows.append({**row, "published_amoebanet": amoebanet, "published_transformer": transformer})
    return rows


def problem(length: int, stages: int) -> PipelineProblem:
    """The 70B model on sequences of `length`, one a micro-batch, each cut over all GPUs of a stage."""
    from ..launcher.config.compose import compose

    inputs = PlanInputs.of(compose([EXPERIMENT, f"cluster.num_nodes={GPUS // 8}"]))
    group = GPUS // stages
    # A tenth for the libraries and fragments; two gathered layers and one layer's whole gradients.
    cap = 0.9 * inputs.cluster.device_memory_bytes - inputs.layer_parameters * (2 * inputs.width + inputs.master)
    return PipelineProblem(
        model=pipeline_model(inputs, group=group, weight_shards=group),
        batch=Batch.equal(STEP_TOKENS // length, length),
        ranks=stages,
        cap_bytes=(cap,) * stages,
        alpha_s=20e-6,
        s_per_byte=1 / inputs.cluster.inter_node_bandwidth,
        slices=SLICES,
    )


def long_context(length: int, stages: int) -> Iterator[dict[str, Any]]:
    """Every schedule of one length and number of stages: those that fit, and why others do not."""
    given = problem(length, stages)
    useful = _useful_s(given)
    for candidate in candidates(given):
        # The same work on the same GPUs whatever the schedule: speeds compare over stages too.
        row = {"tokens": length, "stages": stages, "schedule": candidate.name}
        row |= {"virtual_stages": candidate.virtual_stages, "slices": candidate.slices}
        yield {**row, **_outcome(try_candidate(given, candidate), useful / stages)}


def _useful_s(given: PipelineProblem) -> float:
    """Seconds of all passes without recomputation, attention's backward counted twice its forward as MFU does."""
    ends = (*given.model.layers, given.model.embedding, given.model.head)
    token, pair = sum(one.token_s for one in ends), sum(one.pair_s for one in ends)
    return sum(3 * token * sum(documents) + 3 * pair * sum(n * (n + 1) / 2 for n in documents) for documents in given.batch.micro_batches)


def _outcome(trial: Trial, useful_s: float) -> dict[str, Any]:
    if trial.timeline is None or trial.partition is None:
        return {"fits": False, "reason": trial.reason}
    timeline = trial.timeline
    ways = [way.value for way in trial.partition.recompute]
    return {
        "fits": True,
        "step_s": timeline.step_s,
        "bubble": timeline.bubble_share,
        "peak_gib": max(timeline.peak_bytes) / GIB,
        "recompute": {way: ways.count(way) for way in dict.fromkeys(ways)},
        "useful_share": useful_s / timeline.step_s,
    }


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """By length: the fastest schedule with slices over the fastest without, and 1F1B with 4 slices over 1F1B with as many stages."""
    figures: dict[str, Any] = {}
    for tokens in dict.fromkeys(row["tokens"] for row in rows):
        of_length = [row for row in rows if row["tokens"] == tokens and row["fits"]]
        sliced, whole = ([row for row in of_length if (row["slices"] > 1) == cut] for cut in (True, False))
        best_sliced, best_whole = (min(group, key=lambda row: row["step_s"], default=None) for group in (sliced, whole))
        figures[f"{tokens >> 10}K: fastest"] = _name(min(of_length, key=lambda row: row["step_s"], default=None))
        if best_sliced and best_whole:
            figures[f"{tokens >> 10}K: slices over whole micro-batches"] = round(best_whole["step_s"] / best_sliced["step_s"], 3)
    return figures


def _name(row: dict[str, Any] | None) -> str:
    if row is None:
        return "none fits"
    cut = f", {row['slices']} slices" * (row["slices"] > 1)
    return (
        f"{row['schedule']} of {row['stages']} stages, {row['virtual_stages']} a rank{cut}: {row['step_s']:.1f} s, {row['bubble']:.1%} idle"
    )


def search(stages: int, batches: int) -> Iterator[dict[str, Any]]:
    """Processor seconds of the search for 80 layers: equal micro-batches, and documents of a long tail."""
    base = problem(512 << 10, min(stages, 16))
    drawn = random.Random(0)
    tail = Batch(tuple(tuple(int(2048 * drawn.paretovariate(1.2)) for _ in range(4)) for _ in range(batches)))
    for name, batch in (("equal", Batch.equal(batches, 64 << 10)), ("long tail", tail)):
        given = replace(base, batch=batch, ranks=stages, cap_bytes=base.cap_bytes[:1] * stages, slices=(1, 2, 4))
        began = time.process_time()
        try:
            found = solve(given)
        except PlanError as error:
            yield {
                "batch": name,
                "stages": stages,
                "micro_batches": batches,
                "search_s": time.process_time() - began,
                "refused": str(error),
            }
            continue
        yield {
            "batch": name,
            "stages": stages,
            "micro_batches": batches,
            "search_s": time.process_time() - began,
            "kept": str(found.candidate),
            "gap": found.gap,
            "tried": len(found.trials),
        }


if __name__ == "__main__":
    raise SystemExit(main())
