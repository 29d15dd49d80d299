"""Schedules of a mixture of experts against those of other systems, simulated: FSMoE's sweep of 1,458 layers on its two testbeds.

Nothing is measured here: seconds are those of the cost model (parallel/experts/testbeds.py) with contention `calibrated` (links at
1 / 1.4 speed while both are busy, compute 5 % slower an active link) or `ideal` (none), four equal layers, forward and backward.
Every peer's schedule is its fastest in the same model, most of them given more than they have (parallel/experts/peers.py). A row holds
`seconds` by scheduler; `ours` is the plan that is kept, `ours_whole` the one without half-batches. `lower_s` bounds every schedule,
`whole_lower_s` those that leave the batch whole. `plan_s` is processor time of choosing the plan.

`--show` prints one layer's schedule instead, as words and as a picture; with `--out FILE` it is drawn.
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import random
import statistics
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..errors import ConfigError, UserError
from ..parallel.experts.bounds import bounds
from ..parallel.experts.cost import CALIBRATED, IDEAL, Contention, ExpertLayer
from ..parallel.experts.picture import draw, text_picture
from ..parallel.experts.plan import describe
from ..parallel.experts.recipe import prepare
from ..parallel.experts.simulate import simulate_schedule
from ..parallel.experts.solve import best, candidates, fsmoe_one_stream, schedule
from ..parallel.experts.testbeds import TESTBEDS
from .record import machine, write_json

CONTENTIONS = {contention.name: contention for contention in (CALIBRATED, IDEAL)}
PEERS = ("sequential", "tutel", "tutel_overlap", "lina", "fsmoe_one_stream", "fsmoe", "flowmoe")
OURS = ("ours_whole", "ours")
TARGETS = {"calibrated": {"ours": 1.25, "ours_whole": 1.20}, "ideal": {"ours": 1.42, "ours_whole": 1.35}}
"""Least mean speedups over Tutel, on each testbed."""
LAYER = ExpertLayer(batch=2, tokens=1024, hidden=2048, ffn=4 * 2048, heads=16, capacity=1.2)
"""What `--show` shows where no key says otherwise."""


def main(arguments: list[str] | None = None) -> int:
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.show is not None:
        try:
            return show(options)
        except UserError as error:
            parser.error(str(error))
    if options.json is None:
        parser.error("--json FILE or --show is needed")
    result = {"benchmark": "experts", **machine(), "layers": options.layers, "targets": TARGETS}
    rows = list(_rows(options))
    write_json(options.json, {**result, **summary(rows), "rows": rows})
    print("\n".join(_lines(summary(rows))))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m efflaunch.bench.experts", description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--json", type=Path, metavar="FILE", help="where the sweep's result goes")
    parser.add_argument("--sample", type=_count, metavar="N", help="so many layers of each testbed; all of them without it")
    parser.add_argument("--layers", type=_count, default=4, help="equal layers in a row")
    parser.add_argument("--processes", type=_count, default=1)
    keys = "testbed, contention, schedule, batch, tokens, hidden, ffn, heads, capacity, top_k, products"
    parser.add_argument("--show", nargs="*", metavar="KEY=VALUE", help=f"one layer's schedule instead; keys: {keys}")
    parser.add_argument("--out", type=Path, metavar="FILE", help="with --show: draw it, as .svg, .png or .pdf")
    return parser


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no count of 1 or more")
    return int(text)


def _rows(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    cases = [(name, layer, options.layers) for name in TESTBEDS for layer in _layers(name, options.sample)]
    if options.processes == 1:
        yield from map(row, cases)
        return
    with multiprocessing.get_context("spawn").Pool(options.processes) as pool:
        yield from pool.imap(row, cases, chunksize=16)


def _layers(name: str, sample: int | None) -> list[ExpertLayer]:
    layers = list(TESTBEDS[name].sweep())
    return layers if sample is None else random.Random(0).sample(layers, min(sample, len(layers)))


def row(case: tuple[str, ExpertLayer, int]) -> dict[str, Any]:
    """One layer on one testbed under both kinds of contention."""
    name, layer, layers = case
    setting = {"batch": layer.batch, "heads": layer.heads, "tokens": layer.tokens, "hidden": layer.hidden, "ffn": layer.ffn}
    compared = {key: _compare(name, layer, layers, contention) for key, contention in CONTENTIONS.items()}
    return {"testbed": name, **setting, "capacity": layer.capacity, "products": layer.products, **compared}


def _compare(name: str, layer: ExpertLayer, layers: int, contention: Contention) -> dict[str, Any]:
    cost = TESTBEDS[name].cost(layer)
    began = time.process_time()
    prepared = prepare(cost, contention, layers)
    choices = candidates(prepared)
    kept = best(choices.values())
    planned = schedule(kept, prepared)
    plan_s = time.process_time() - began
    choices |= {"ours": kept, "ours_whole": best(choices.values(), half_batches=False), "fsmoe_one_stream": fsmoe_one_stream(prepared)}
    limit = bounds(cost, contention, layers)
    return {
        "seconds": {scheduler: choices[scheduler].seconds for scheduler in (*PEERS, *OURS)},
        "lower_s": limit.any_s,
        "whole_lower_s": limit.whole_s,
        "kept": kept.name,
        "parts": planned.parts,
        "degrees": [planned.forward.degree, planned.backward.degree],
        "plan_s": plan_s,
    }


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Figures by contention: over both testbeds, and by testbed."""
    testbeds = list(dict.fromkeys(row["testbed"] for row in rows))
    return {
        name: {**_figures([row[name] for row in rows], name)}
        | {testbed: _figures([row[name] for row in rows if row["testbed"] == testbed], name) for testbed in testbeds}
        for name in CONTENTIONS
    }


def _figures(outcomes: list[dict[str, Any]], contention: str) -> dict[str, Any]:
    times = [one["seconds"] for one in outcomes]

    def over(peer: str, ours: str) -> list[float]:
        return [one[peer] / one[ours] for one in times]

    figures: dict[str, Any] = {"layers": len(outcomes)}
    for ours, suffix in (("ours", ""), ("ours_whole", "_whole")):
        for peer in ("tutel", "fsmoe", "flowmoe"):
            figures[f"mean_over_{peer}{suffix}"] = statistics.fmean(over(peer, ours))
        figures[f"least_over_fsmoe{suffix}"] = min(over("fsmoe", ours))
        figures[f"meets_aim{suffix}"] = figures[f"mean_over_tutel{suffix}"] >= TARGETS[contention][ours]
    figures["least_over_flowmoe"] = min(over("flowmoe", "ours"))
    figures["schedulers"] = {name: _scheduler(name, outcomes) for name in (*PEERS, *OURS)}
    figures["under_a_bound"] = sum(_under(one) for one in outcomes)
    figures["half_batches_kept"] = statistics.fmean(one["parts"] > 1 for one in outcomes)
    figures["degrees_differ"] = statistics.fmean(one["degrees"][0] != one["degrees"][1] for one in outcomes)
    figures["plan_s_p50"] = statistics.median(one["plan_s"] for one in outcomes)
    figures["plan_s_max"] = max(one["plan_s"] for one in outcomes)
    return figures


def _scheduler(name: str, outcomes: list[dict[str, Any]]) -> dict[str, float]:
    return {
        "over_tutel": statistics.fmean(one["seconds"]["tutel"] / one["seconds"][name] for one in outcomes),
        "times_whole_lower": statistics.geometric_mean(one["seconds"][name] / one["whole_lower_s"] for one in outcomes),
        "times_lower": statistics.geometric_mean(one["seconds"][name] / one["lower_s"] for one in outcomes),
    }


def _under(one: dict[str, Any]) -> int:
    """How many schedules of a layer are faster than a bound that holds for them: none, or simulation or bound are wrong."""
    slack = 1 - 1e-9
    whole = [name for name in (*PEERS, *OURS) if name not in ("ours", "flowmoe")]
    under = sum(seconds < slack * one["lower_s"] for seconds in one["seconds"].values())
    return under + sum(one["seconds"][name] < slack * one["whole_lower_s"] for name in whole)


def _lines(figures: dict[str, Any]) -> Iterator[str]:
    for contention, values in figures.items():
        for key, value in values.items():
            if isinstance(value, (int, float)):
                yield f"{contention} {key}: {value:.4g}"


def show(options: argparse.Namespace) -> int:
    """Print one layer's schedule, and draw it where a file is named."""
    keys = {"testbed": "B", "contention": "calibrated", "schedule": "ours"}
    sizes: dict[str, Any] = {}
    for word in options.show:
        key, _, value = word.partition("=")
        if key in keys:
            keys[key] = value
        elif key in ("batch", "tokens", "hidden", "ffn", "heads", "top_k", "products") and value.isdecimal() and int(value) > 0:
            sizes[key] = int(value)
        elif key == "capacity" and _is_positive(value):
            sizes[key] = float(value)
        else:
            hint = "--show testbed=A batch=4 tokens=2048 capacity=1.2 schedule=fsmoe"
            raise ConfigError("--show", found=word, expected="one of its keys (--help), and a size of it", hint=hint)
    testbed, contention = _one_of("testbed", keys, TESTBEDS), _one_of("contention", keys, CONTENTIONS)
    cost = testbed.cost(replace(LAYER, **sizes))
    prepared = prepare(cost, contention, options.layers)
    choices = candidates(prepared)
    choices["ours"] = best(choices.values())
    plan = schedule(_one_of("schedule", keys, choices), prepared)
    phases = simulate_schedule(plan, cost, contention)
    print(f"{describe(plan)}\n\n{text_picture(phases)}")
    if options.out is not None:
        draw(phases, f"{plan.name} on {testbed.rates.name}, contention {contention.name}", options.out)
        print(f"picture: {options.out}")
    return 0


def _is_positive(text: str) -> bool:
    try:
        return 0 < float(text) < math.inf
    except ValueError:
        return False


def _one_of(key: str, keys: dict[str, str], table: dict[str, Any]) -> Any:
    if keys[key] not in table:
        raise ConfigError(f"--show {key}=", found=keys[key], expected=", ".join(table), hint=f"--show {key}={next(iter(table))}")
    return table[keys[key]]


if __name__ == "__main__":
    raise SystemExit(main())
