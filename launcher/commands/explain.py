"""`efflaunch explain RUN_DIR`: one step of a run, from its metrics, or planned again where they do not hold the plan."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...errors import EXIT_DONE, ConfigError
from ...parallel.sequence.cost import CostModel
from ...parallel.sequence.explain import Explanation
from ...parallel.sequence.plan import Group, MicroBatch, StepPlan, check_plan
from ...parallel.sequence.stored import load_cost
from ...utils.text import typed
from ..config.run_config import Config
from ..rundir.metrics_index import step_events
from ..rundir.metrics_reader import Event
from ..rundir.run_dir import read_run
from .arguments import STEP, CommandParser, add_certify, add_json, add_run_dir, number_in
from .sequence_plan import certified, draw_step, explain_plan, explanation_dict, plan_name, plan_step, step_cost, with_bound

Measured = dict[tuple[int, int], float]
"""Seconds of a group by (micro-batch, first rank)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RecordedStep:
    """One step as it was run, or as it is planned again. `event` is its line of metrics.jsonl, if there is one."""

    step: int
    plan: StepPlan
    measured: Measured
    event: Event | None
    notes: tuple[str, ...]


DESCRIPTION = "Who held which sequences in a step, why, what bounds it, and what other plans would have cost."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `efflaunch explain`."""
    add_run_dir(parser)
    parser.add_argument("--step", type=number_in(int, STEP), help="counted from 1; the newest if not given")
    parser.add_argument("--out", type=Path, metavar="FILE", help="draw the step, as .svg, .png or .pdf")
    add_certify(parser)
    add_json(parser)


def main(words: list[str]) -> int:
    """Run `efflaunch explain` and return its exit code."""
    parser = CommandParser("explain", DESCRIPTION)
    add_arguments(parser)
    options = parser.parse_args(words)
    return explain(options.run_dir, step=options.step, certify_s=options.certify, out=options.out, as_json=options.json)


def explain(run_dir: Path, *, step: int | None, certify_s: float | None, out: Path | None, as_json: bool) -> int:
    """Print the explanation; with `out`, draw it as well. Works on a run that has not ended yet."""
    config = read_run(run_dir).config
    events = step_events(run_dir, step)
    cost = _run_cost(events, config)
    recorded = find_step(run_dir, config, cost, step, events)
    explanation = explain_plan(config, certified(recorded.plan, cost, certify_s), cost, recorded.measured)
    if out is not None:
        draw_step(explanation, f"Step {recorded.step} of {run_dir.name}", out)
    measured_s = None if recorded.event is None else recorded.event.get("step_s")
    if as_json:
        facts = {"run_dir": str(run_dir), "step": recorded.step, "measured_s": measured_s, "cost_source": cost.source}
        print(json.dumps({**facts, **explanation_dict(explanation), "notes": list(recorded.notes)}, indent=1))
        return EXIT_DONE
    from .sequence_view import show_explanation

    show_explanation(explanation, _heading(recorded.step, explanation, measured_s), recorded.notes)
    if out is not None:
        print(f"wrote {out}")
    return EXIT_DONE


def _heading(step: int, explanation: Explanation, measured_s: float | None) -> str:
    from ...units import format_precise

    plan = explanation.plan
    measured = "" if measured_s is None else f", measured {format_precise(measured_s)}"
    return (
        f"step {step}: {len(plan.lengths):,} sequences, {sum(plan.lengths):,} tokens on {plan.world_size} ranks, "
        f"{plan_name(explanation)}, modelled {format_precise(explanation.line.step_s)}{measured}"
    )


def _run_cost(events: list[Event], config: Config) -> CostModel:
    """The model the newest attempt planned with; for runs whose metrics lack it, what a new run would plan with."""
    starts = [event for event in events if event["event"] == "start" and "cost_model" in event]
    if not starts:
        return step_cost(config)
    try:
        return load_cost(starts[-1]["cost_model"])
    except ValueError as error:
        where, expected = str(config.run.id), "metrics.jsonl as efflaunch wrote it"
        raise ConfigError(
            f"metrics.jsonl of {where}", found=str(error), expected=expected, hint="undo the edit of its last start"
        ) from error


def find_step(run_dir: Path, config: Config, cost: CostModel, step: int | None, events: list[Event]) -> RecordedStep:
    """The step asked for (None: the last in the metrics). ConfigError where the run has no such step."""
    steps = {int(event["step"]): event for event in events if event["event"] == "step"}
    if step is None and not steps:
        raise ConfigError(
            str(run_dir), found="no finished step in metrics.jsonl", expected="one to explain", hint=typed("explain", run_dir, "--step", 1)
        )
    number = max(steps) if step is None else step
    if not 1 <= number <= config.train.steps:
        raise ConfigError("--step", found=str(number), expected=f"1 to {config.train.steps}, the steps of this run", hint="--step 1")
    event = steps.get(number)
    if event is not None and event.get("groups"):
        plan, measured = recorded_plan(event["groups"], cost, str(run_dir), lambda: step_lengths(config, number, run_dir))
        return RecordedStep(step=number, plan=_as_run(plan, event, cost), measured=measured, event=event, notes=())
    plan = plan_step(config, step_lengths(config, number, run_dir), cost)
    return RecordedStep(step=number, plan=plan, measured={}, event=event, notes=_replanned(plan, event))


def step_lengths(config: Config, step: int, run_dir: Path) -> tuple[int, ...]:
    """Lengths of a step's sequences, counted from 1: a function of the configuration, the corpora and the mixes the run has had."""
    from ..checks import open_run_data

    return open_run_data(config, run_dir)[0].lengths(step - 1)


def _replanned(plan: StepPlan, event: Event | None) -> tuple[str, ...]:
    if event is None:
        return ("the metrics do not hold this step: it was planned again, and nothing of it is measured",)
    if event.get("plan") not in (None, str(plan)):
        return ("the run used another plan for this step: its configuration, or what it was planned with, has changed since",)
    return ("the metrics hold no groups: the plan was solved again: it is the one the run used",)


def _as_run(plan: StepPlan, event: Event, cost: CostModel) -> StepPlan:
    """The recorded plan with the bound the run knew, or the closed-form one."""
    from dataclasses import replace

    priced = replace(cost.priced(plan), source=str(event.get("planned_by", "recorded")))
    if event.get("lower_bound_s"):
        return replace(priced, lower_bound_s=float(event["lower_bound_s"]), bound=str(event.get("bound", "")))
    return with_bound(priced, cost)


def recorded_plan(entries: Any, cost: CostModel, where: str, all_lengths: Callable[[], tuple[int, ...]]) -> tuple[StepPlan, Measured]:
    """The plan in a step event's `groups`, and what was measured of it. `all_lengths` is asked where they leave lengths out.

    ConfigError where the groups are no plan.
    """
    measured: Measured = {}
    batches: dict[int, list[Group]] = {}
    try:
        for entry in entries:
            batches.setdefault(int(entry["micro_batch"]), []).append(_group(entry))
        if all("lengths" in entry for entry in entries):
            length_of = {i: int(n) for entry in entries for i, n in zip(entry["sequences"], entry["lengths"], strict=True)}
            lengths = tuple(length_of[i] for i in range(len(length_of)))
        else:
            lengths = all_lengths()
        plan = StepPlan(cost.world_size, lengths, tuple(MicroBatch(tuple(batches[index])) for index in range(len(batches))))
        for entry in entries:
            if entry.get("measured_s") is not None:
                measured[int(entry["micro_batch"]), int(entry["first_rank"])] = _measured(
                    entry, [lengths[i] for i in entry["sequences"]], cost
                )
    except (IndexError, KeyError, TypeError, ValueError) as error:
        raise ConfigError(
            f"{where}/metrics.jsonl", found=f"groups that are no plan ({error})", expected="what efflaunch wrote", hint="another --step"
        ) from error
    check_plan(plan)
    return plan, measured


def _measured(entry: Mapping[str, Any], lengths: list[int], cost: CostModel) -> float:
    """Measured seconds of a group's sequences: what the run counts to every group beside them is in the prediction too."""
    beside = 0.0 if entry.get("predicted_s") is None else float(entry["predicted_s"]) - cost.group_s(lengths, int(entry["degree"]))
    return max(0.0, float(entry["measured_s"]) - max(0.0, beside))


def _group(entry: Mapping[str, Any]) -> Group:
    return Group(int(entry["first_rank"]), int(entry["degree"]), int(entry["ulysses"]), tuple(int(i) for i in entry["sequences"]))
