"""Plans of single steps for the commands that show them: explain, plan --lengths and simulate. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...errors import ConfigError
from ...estimate.measured.profile import find_profile, profile_key
from ...estimate.timing.sequence import cost_model_of
from ...model.spec import active_layer_parameters, model_spec
from ...parallel.config import SequenceMode
from ...parallel.layout import solve_layout
from ...parallel.sequence.cost import CostModel
from ...parallel.sequence.explain import Explanation, Solver, explain
from ...parallel.sequence.plan import StepPlan
from ..config.ledger import hardware_of, plan
from ..config.run_config import Config

if TYPE_CHECKING:
    from ...parallel.sequence.service import PlanRequest
    from ...parallel.sequence.timeline import Bar


def step_cost(config: Config) -> CostModel:
    """The cost model of a configuration, from its profile where one fits.

    Which GPUs a cluster has is not looked up here: a profile of this model on as many of any kind is taken.
    """
    key = profile_key(model_spec(config.model), config.memory, config.train, config.cluster, hardware_of(config))
    profile, _ = find_profile(config.parallel.profile, key)
    cost = cost_model_of(plan(config).slowest)
    # A profile is of all layers, and a stage has some.
    return cost if profile is None or cost.num_stages > 1 else profile.refine(cost)


def plan_step(config: Config, lengths: Sequence[int], cost: CostModel) -> StepPlan:
    """The plan a run of this configuration makes for these lengths, with prediction and bound."""
    from ...parallel.sequence.service import solve, static_plan

    request = _request(config, cost)
    if config.parallel.sequence is not SequenceMode.STATIC:
        return solve(lengths, request)
    return with_bound(static_plan(lengths, request), cost)


def _request(config: Config, cost: CostModel) -> PlanRequest:
    """What a run asks its planner for."""
    from ...parallel.sequence.service import PlanRequest

    spec, data = model_spec(config.model), config.data
    layout = solve_layout(config.parallel, config.cluster, spec, max_seq_len=data.max_seq_len, global_batch_tokens=data.global_batch_tokens)
    return PlanRequest(
        cost=cost,
        static_degree=layout.sp_degree,
        static_ulysses=layout.ulysses,
        linear_cost_tokens=active_layer_parameters(spec) / spec.query_size,
        micro_batches=config.parallel.pipeline.micro_batches,
    )


def with_bound(plan: StepPlan, cost: CostModel) -> StepPlan:
    """The plan with the staircase bound of its lengths, where that holds."""
    from ...parallel.sequence.adaptive import bounded
    from ...parallel.sequence.bound import staircase_bound

    return bounded(plan, staircase_bound(plan.lengths, cost))


def certified(plan: StepPlan, cost: CostModel, seconds: float | None) -> StepPlan:
    """The plan with a tighter bound, if one is found in so many seconds; None: as it is."""
    if seconds is None:
        return plan
    from ...parallel.sequence.adaptive import bounded
    from ...parallel.sequence.bound import class_milp_bound

    if seconds <= 0:
        raise ConfigError("--certify", found=f"{seconds:g}", expected="seconds above 0", hint="--certify 10")
    return bounded(plan, class_milp_bound(plan.lengths, cost, plan_s=cost.plan_s(plan), time_limit_s=seconds))


def explain_plan(config: Config, plan: StepPlan, cost: CostModel, measured: Mapping[tuple[int, int], float] | None = None) -> Explanation:
    """Explain a plan, with the other plans a person would think of."""
    from ...parallel.sequence.solve import solve_adaptive

    adaptive = config.parallel.sequence is not SequenceMode.STATIC
    return explain(
        plan,
        cost,
        adaptive=adaptive,
        solver=lambda model: solve_adaptive(plan.lengths, model),
        others=_others(plan, adaptive),
        measured=measured,
        barrier_free=config.parallel.barrier_free,
    )


def _others(plan: StepPlan, adaptive: bool) -> dict[str, Solver]:
    from ...parallel.sequence.solve import solve_adaptive, solve_best_static, solve_greedy

    lengths = plan.lengths
    others: dict[str, Solver] = {
        "adaptive": lambda model: solve_adaptive(lengths, model),
        "greedy": lambda model: solve_greedy(lengths, model),
        "best static degree": lambda model: solve_best_static(lengths, model),
    }
    return {name: solver for name, solver in others.items() if name != ("adaptive" if adaptive else None)}


def plan_name(explanation: Explanation) -> str:
    """Name the kind of plan, for headings."""
    source = explanation.plan.source
    if source == "late":
        return "greedy plan (the planner was late)"
    if explanation.adaptive and source in ("static", "greedy"):
        return f"adaptive plan (the best {source} one, which no search beat)"
    return f"{source} plan"


def explanation_dict(explanation: Explanation) -> dict[str, Any]:
    """The stable form of an explanation; docs/sequence.md lists the keys."""
    plan, line = explanation.plan, explanation.line
    return {
        "world_size": plan.world_size,
        "sequences": len(plan.lengths),
        "tokens": sum(plan.lengths),
        "source": plan.source,
        "predicted_s": line.step_s,
        "lower_bound_s": plan.lower_bound_s,
        "bound": plan.bound,
        "gap": max(0.0, line.step_s / plan.lower_bound_s - 1) if plan.lower_bound_s else None,
        "busy_share": line.busy_share,
        "waiting_share": line.waiting_share,
        "gather_share": line.gather_share,
        "overhead_share": line.overhead_share,
        "micro_batches": [
            {
                "start_s": shelf.start_s,
                "overhead_s": shelf.overhead_s,
                "stop_s": shelf.stop_s,
                "groups": [_group(bar) for bar in line.of(index)],
            }
            for index, shelf in enumerate(line.shelves)
        ],
        "longest": {
            "sequence": explanation.longest,
            "tokens": plan.lengths[explanation.longest],
            "degree": explanation.group.degree,
            "choices": [
                {
                    "degree": choice.degree,
                    "ulysses": choice.ulysses,
                    "verdict": choice.verdict.value,
                    "reason": choice.reason,
                    "sequence_s": choice.sequence_s,
                    "rank_s": choice.rank_s,
                }
                for choice in explanation.choices
            ],
        },
        "next_best": None if explanation.next_best is None else _alternative(explanation.next_best, line.step_s),
        "alternatives": [_alternative(other, line.step_s) for other in explanation.alternatives],
        "words": list(explanation.words),
    }


def _group(bar: Bar) -> dict[str, Any]:
    return {
        "first_rank": bar.group.first_rank,
        "degree": bar.group.degree,
        "ulysses": bar.group.ulysses,
        "sequences": list(bar.group.sequences),
        "lengths": list(bar.lengths),
        "start_s": bar.start_s,
        "predicted_s": bar.seconds,
        "measured_s": bar.measured_s,
    }


def _alternative(other: Any, step_s: float) -> dict[str, Any]:
    return {
        "name": other.name,
        "predicted_s": other.predicted_s,
        "slower": None if other.predicted_s is None else other.predicted_s / step_s - 1,
        "longest_degree": other.longest_degree,
        "reason": other.reason,
    }


def draw_step(explanation: Explanation, title: str, path: Path) -> None:
    """The picture of a step, under its title."""
    from ...parallel.sequence.picture import Caption, draw
    from ...units import format_precise

    plan, line = explanation.plan, explanation.line
    gap = (
        ""
        if plan.lower_bound_s is None
        else f"; at most {max(0.0, line.step_s / plan.lower_bound_s - 1):.1%} above the best plan there can be"
    )
    subtitle = (
        f"{len(plan.lengths):,} sequences, {sum(plan.lengths):,} tokens on {plan.world_size:,} ranks; "
        f"ranks work {line.busy_share:.0%} of the time{gap}"
    )
    many = len(plan.micro_batches)
    heading = f"{title}: {many} micro-batch{'es' * (many > 1)}, {format_precise(line.step_s)} modelled"
    draw(line, Caption(title=heading, subtitle=subtitle, lower_bound_s=plan.lower_bound_s, bound=plan.bound), path)
