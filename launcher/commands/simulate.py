"""`efflaunch simulate`: modelled step times of static, greedy, FlexSP's and our plans. Runs nothing, imports no torch."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from statistics import fmean
from typing import Any

from ...errors import EXIT_DONE, ConfigError
from ...estimate.plan_inputs import PlanInputs
from ...estimate.timing.flops import matrix_parameters
from ...estimate.timing.step import experts_exchange_s, experts_wait_s
from ...parallel.sequence.cost import CostModel
from ...parallel.sequence.plan import StepPlan
from ...parallel.simulate import Contestant, Row, Step, gaps, rows, simulate
from ...training.data.lengths import open_lengths
from ...utils.ranges import Range
from ..config.ledger import plan
from ..config.run_config import Config
from .arguments import SEARCH_S, CommandParser, add_config_arguments, add_json, add_lengths, composed, number_in
from .sequence_plan import step_cost

OURS = "efflaunch"


@dataclass(frozen=True, kw_only=True, slots=True)
class SimulateRequest:
    """Parsed command line of `efflaunch simulate`."""

    lengths: str
    sequences: int | None
    seed: int
    steps: int
    flexsp_steps: int
    flexsp_s: float
    """Limit of one of FlexSP's MILPs."""


DESCRIPTION = "Modelled step times of static, greedy, FlexSP's and our plans. Takes the arguments of train."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `efflaunch simulate`."""
    add_config_arguments(parser)
    add_lengths(parser, required=True)
    parser.add_argument("--steps", type=number_in(int, Range(1, 1_000_000)), default=40, help="how many steps; 40")
    parser.add_argument(
        "--flexsp-steps",
        type=number_in(int, Range(0, 1_000_000)),
        default=1,
        metavar="N",
        help="steps FlexSP's slow solver is asked for; 1, 0: none",
    )
    parser.add_argument("--flexsp-seconds", type=number_in(float, SEARCH_S), default=10.0, metavar="S", help="its limit for each MILP; 10")
    add_json(parser)


def main(words: list[str]) -> int:
    """Run `efflaunch simulate` and return its exit code."""
    parser = CommandParser("simulate", DESCRIPTION)
    add_arguments(parser)
    options = parser.parse_intermixed_args(words)
    config = composed(options)
    if config is None:
        return EXIT_DONE
    request = SimulateRequest(
        lengths=options.lengths,
        sequences=options.sequences,
        seed=options.seed,
        steps=options.steps,
        flexsp_steps=options.flexsp_steps,
        flexsp_s=options.flexsp_seconds,
    )
    return print_simulation(config, request, as_json=options.json)


def print_simulation(config: Config, request: SimulateRequest, *, as_json: bool) -> int:
    """Print one row a planner, as a table or as JSON (keys: docs/sequence.md)."""
    if request.steps < 1:
        raise ConfigError("--steps", found=str(request.steps), expected="1 or more", hint="--steps 40")
    cost = step_cost(config)
    steps = simulate(
        step_lengths(config, request),
        cost,
        contestants(cost, request),
        on_step=None if as_json else partial(_progress, total=request.steps),
    )
    if not as_json and sys.stderr.isatty():
        print(file=sys.stderr)
    facts = simulation_dict(config, request, cost, steps)
    if as_json:
        print(json.dumps(facts, indent=1))
        return EXIT_DONE
    show(facts, rows(steps, OURS))
    return EXIT_DONE


def step_lengths(config: Config, request: SimulateRequest) -> Iterator[tuple[int, ...]]:
    """Lengths of each step; step s is drawn with a seed of its own."""
    source = open_lengths(request.lengths, max_seq_len=config.data.max_seq_len)
    for step in range(request.steps):
        seed = request.seed * 1_000_003 + step
        if request.sequences is not None:
            yield tuple(source.draw(request.sequences, seed).tolist())
        else:
            yield tuple(source.draw_tokens(config.data.global_batch_tokens, seed).tolist())


def contestants(cost: CostModel, request: SimulateRequest) -> list[Contestant]:
    """Return the planners to compare, ours last."""
    from ...parallel.sequence.solve import solve_adaptive, solve_best_static, solve_greedy

    compared = [Contestant(name="best static degree", plan=solve_best_static), Contestant(name="greedy", plan=solve_greedy)]
    if request.flexsp_steps > 0:
        compared.append(Contestant(name="FlexSP's MILP", plan=partial(_flexsp, limit_s=request.flexsp_s), max_steps=request.flexsp_steps))
    return [*compared, Contestant(name=OURS, plan=solve_adaptive)]


def _flexsp(lengths: Sequence[int], cost: CostModel, *, limit_s: float) -> StepPlan:
    from ...parallel.sequence.flexsp import flexsp_plan

    return flexsp_plan(lengths, cost, time_limit_s=limit_s).plan


def _progress(step: Step, *, total: int) -> None:
    if sys.stderr.isatty():
        print(f"\rstep {step.index + 1} of {total}", end="", file=sys.stderr, flush=True)


def simulation_dict(config: Config, request: SimulateRequest, cost: CostModel, steps: list[Step]) -> dict[str, Any]:
    """The stable form; docs/sequence.md lists the keys."""
    above = gaps(steps, OURS)
    return {
        "experiment": config.experiment,
        "cluster": config.cluster.name,
        "world_size": cost.world_size,
        "tokens_per_rank": cost.tokens_per_rank,
        "cost_source": cost.source,
        "lengths": request.lengths,
        "seed": request.seed,
        "sequences_mean": fmean(step.sequences for step in steps),
        "tokens_mean": fmean(step.tokens for step in steps),
        "longest": max(step.longest for step in steps),
        "gap_mean": fmean(above) if above else None,
        "gap_max": max(above, default=None),
        "experts": experts_dict(plan(config).inputs, fmean(step.tokens for step in steps)),
        "planners": [asdict(row) for row in rows(steps, OURS)],
        "steps": [_step(step) for step in steps],
    }


def experts_dict(inputs: PlanInputs, tokens: float) -> dict[str, Any] | None:
    """What the modelled seconds of a step of so many tokens hold of experts; None for a model without."""
    experts = inputs.spec.experts
    if experts is None:
        return None
    # Of the whole world, whatever the groups: every token's rows are sent once for each of its experts.
    alone = replace(inputs, layout=replace(inputs.layout, sp_degree=1, ulysses=1))
    return {
        "experts": experts.num_experts,
        "experts_per_token": experts.per_token,
        "layers": inputs.spec.expert_layers,
        "expert_parallel": inputs.expert_parallel,
        "active_parameters": matrix_parameters(inputs),
        "imbalance": inputs.row_share,
        "exchange_s": tokens * experts_exchange_s(alone) / inputs.layout.world_size,
        "wait_s": tokens * experts_wait_s(alone) / inputs.layout.world_size,
    }


def _step(step: Step) -> dict[str, Any]:
    return {
        "sequences": step.sequences,
        "tokens": step.tokens,
        "longest": step.longest,
        "lower_bound_s": step.lower_bound_s,
        "step_s": {name: outcome.step_s for name, outcome in step.outcomes.items()},
    }


def _experts_line(experts: dict[str, Any]) -> str:
    """What of the experts is in the seconds, in one sentence."""
    chosen = f"{experts['experts_per_token']} of {experts['experts']} experts"
    size = f"{experts['active_parameters'] / 1e9:.2f} billion weights of a token, {chosen}"
    if experts["expert_parallel"] == 1:
        return f"{size}; experts are gathered as all weights are."
    sent = f"{experts['exchange_s']:.4g} s a step for rows to experts on {experts['expert_parallel']} ranks and back, not hidden"
    waits = f"{experts['wait_s']:.4g} s of waiting for the busiest rank, which is taken to get {experts['imbalance']:g} times the mean"
    return f"{size}; {sent}, and {waits}."


def show(facts: dict[str, Any], results: list[Row]) -> None:
    """Print the facts and results as tables."""
    from rich.table import Table

    from ...units import format_precise
    from .sequence_view import make_console

    console = make_console()
    size = f"{facts['sequences_mean']:,.0f} sequences and {facts['tokens_mean']:,.0f} tokens, longest {facts['longest']:,}"
    where = f"{facts['world_size']:,} ranks of {facts['cluster']}, lengths of {facts['lengths']}"
    console.print(f"[bold]{facts['experiment']}[/bold] on {where}: {len(facts['steps'])} steps of {size}")
    table = Table(title="modelled seconds of a step", title_justify="left", title_style="bold")
    for name in (
        "planner",
        "steps",
        "mean",
        "median",
        "worst",
        "micro-batches",
        "planning, median",
        "planning, worst",
        f"{OURS} is faster",
    ):
        table.add_column(name, justify="left" if name == "planner" else "right")
    for row in results:
        faster = "" if row.name == OURS else f"{row.speedup:.2f}x"
        seconds = [f"{value:.4g}" for value in (row.mean_s, row.median_s, row.worst_s)]
        table.add_row(
            row.name,
            str(row.steps),
            *seconds,
            f"{row.micro_batches:.1f}",
            format_precise(row.plan_s_p50),
            format_precise(row.plan_s_max),
            faster,
        )
    console.print(table)
    if facts["gap_mean"] is not None:
        console.print(
            f"{OURS}'s plans are at most {facts['gap_mean']:.1%} above the best there can be, {facts['gap_max']:.1%} in the worst step."
        )
    if facts["experts"] is not None:
        console.print(_experts_line(facts["experts"]))
    console.print(f"These are seconds of a cost model ({facts['cost_source']}), not of a run.")
    console.print("`planning` is wall time here; in the first step it has the loading of compiled loops in it.")
