"""`efflaunch plan`: what a configuration needs and how long a step takes, before anything runs. Imports no torch."""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from ...cluster.config import Device
from ...errors import EXIT_DONE, ConfigError
from ...estimate.build import build_ledger
from ...estimate.certificate import RECORD, certify
from ...estimate.determinism import said_of_order
from ...estimate.footprint.activations import class_splits
from ...estimate.ledger import Account, Ledger
from ...estimate.plan_inputs import PlanInputs
from ...estimate.solver.report import SolveReport, describe_policy
from ...estimate.stage_plans import stage_plans
from ...estimate.suggestions import Suggestion, suggest
from ...estimate.timing.bandwidth import device_update_rate, host_update_rate, offload_link
from ...estimate.timing.expert_order import expert_order
from ...estimate.timing.flops import matrix_parameters
from ...estimate.timing.step import Timing
from ...memory.activation_classes import ExpertSizes
from ...parallel.pipeline.config import PipelineConfig
from ...parallel.sequence.kernel_choice import KernelChoice
from ...parallel.sharding.ds_config import describe, ds_config, read_file
from ...training.data.train_stages import train_stages
from ...training.optimizers.check import inexact
from ...units import format_seconds
from ..config.checks import model_notes
from ..config.ledger import plan
from ..config.run_config import Config
from ..machine_checks import kernel_here
from .arguments import CommandParser, add_certify, add_config_arguments, add_json, add_lengths, composed

SUGGESTIONS = 8
"""Shown at most."""


DESCRIPTION = "What a run would need, without running it. Takes the arguments of train."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `efflaunch plan`."""
    add_config_arguments(parser)
    add_json(parser)
    add_lengths(parser, required=False)
    parser.add_argument("--out", type=Path, metavar="FILE", help="with --lengths: draw the step, as .svg, .png or .pdf")
    add_certify(parser)
    parser.add_argument("--pipelines", action="store_true", help="compare the ways to cut the model into stages, and none, instead")


def main(words: list[str]) -> int:
    """Run `efflaunch plan` and return its exit code."""
    parser = CommandParser("plan", DESCRIPTION)
    add_arguments(parser)
    options = parser.parse_intermixed_args(words)
    config = composed(options)
    if config is None:
        return EXIT_DONE
    if options.pipelines:
        from .plan_pipelines import print_pipelines

        if options.lengths is not None:
            hint = "parallel.pipeline.auto=true --lengths ..., for a step of the pipeline that is chosen"
            raise ConfigError("efflaunch plan", found="--pipelines with --lengths", expected="one of the two", hint=hint)
        return print_pipelines(config, options.json)
    if options.lengths is None:
        return print_plan(config, options.json)
    from .plan_step import PlanStepRequest, print_step_plan

    request = PlanStepRequest(
        lengths=options.lengths, sequences=options.sequences, seed=options.seed, certify_s=options.certify, out=options.out
    )
    return print_step_plan(config, request, as_json=options.json)


def print_plan(config: Config, as_json: bool) -> int:
    """Print the plan, as tables or as JSON (keys: docs/plan.md). Exit code 0 also where it does not fit: that is an answer."""
    ledger = plan(config)
    suggestions = suggest(ledger, most=SUGGESTIONS)
    if as_json:
        print(json.dumps(plan_dict(config, ledger, suggestions), indent=2))
        return EXIT_DONE
    from .plan_view import show_plan

    show_plan(config, ledger, suggestions, notes(config, ledger))
    return EXIT_DONE


def plan_dict(config: Config, ledger: Ledger, suggestions: tuple[Suggestion, ...]) -> dict[str, Any]:
    """The stable form of a plan; docs/plan.md lists the keys."""
    return {
        "experiment": config.experiment,
        "model": _model(config, ledger),
        "layout": _layout(ledger),
        "pipeline": _pipeline(ledger),
        "device": _account(ledger.device),
        "host": _account(ledger.host),
        "step": _step(ledger.timing),
        "rates": _rates(ledger),
        "policy": _policy(ledger),
        "solver": _solver(ledger.report),
        "certificate": _certificate(ledger),
        **_train_stages(config, ledger),
        "attention_kernel": _attention_kernel(config),
        "fits": ledger.fits,
        "suggestions": [_suggestion(entry) for entry in suggestions],
        "notes": notes(config, ledger),
    }


def notes(config: Config, ledger: Ledger) -> list[str]:
    """List facts about the plan that are no mistakes but surprise."""
    length = config.data.max_seq_len
    lines = model_notes(config)
    if ledger.layout.num_micro_batches == 1 and ledger.layout.num_groups > config.data.global_batch_tokens // length:
        lines.append("a step of longest sequences leaves some groups of ranks idle: raise data.global_batch_tokens or parallel.sp_degree")
    lines += [*_pipeline_notes(ledger), *_engine_notes(config, ledger)]
    if config.cluster.device is Device.CUDA:
        kernel = _attention_kernel(config)
        lines.append(f"attention kernel, by what is installed here: {kernel['name'] or 'none'}; {kernel['why']}")
        lines += _order(config, ledger)
    if config.optim.update.value == "backward" and config.checkpoint.every_steps is not None:
        lines.append("optim.update=backward: checkpoints are copied behind the forward pass alone, backward already changes weights")
    return [*lines, *(f"not exact: {line}" for line in inexact(config.optim))]


def _attention_kernel(config: Config) -> dict[str, Any]:
    """The kernel that this Python's packages would give; name null where none of them can do it, and why."""
    try:
        choice = kernel_here(config)
    except ConfigError as error:
        # Ranks may run where more is installed: they, and a start on this machine, refuse.
        return {"name": None, "version": None, "why": f"{error.found}; {error.hint}"}
    return {"name": choice.kernel, "version": choice.version, "why": choice.why}


def _order(config: Config, ledger: Ledger) -> list[str]:
    """Which sums of this plan differ from one time to the next, by the kernel that is installed here, or what it costs that none does."""
    try:
        choice = kernel_here(config)
    except ConfigError:  # the line on the kernel says why there is none; the plan is made for this one all the same
        choice = KernelChoice(ledger.inputs.attention_kernel.value, "estimated")
    said = said_of_order(ledger.inputs, choice)
    return [] if said is None else [said]


def _engine_notes(config: Config, ledger: Ledger) -> list[str]:
    """What a ds_config.json says, and what of it this model or this memory policy changes."""
    engine, lines = config.engine, []
    if engine.config is not None:
        lines.append(describe(ds_config(read_file(engine.config), config, engine.config), engine.config))
    largest = ledger.inputs.head_parameters
    if (bucket := engine.zero.get("reduce_bucket_size", largest)) < largest:
        lines.append(f"reduce_bucket_size={bucket} becomes the model's largest parameter, {largest}: a bucket takes it whole")
    if ledger.inputs.policy.segment_layers > 1 and not ledger.inputs.policy.graph and engine.zero.get("stage3_prefetch_bucket_size"):
        lines.append("stage3_prefetch_bucket_size becomes 0 with memory.segment_layers above 1: what a segment reads is not yet whole then")
    return lines


def _pipeline_notes(ledger: Ledger) -> list[str]:
    """What the stages of a pipeline cost, and what a step would take without them."""
    if not ledger.stages:
        return []
    asked, lines = ledger.asked, []
    count, stages = ledger.layout.num_micro_batches, ledger.layout.stages
    if count < stages:
        lines.append(f"{count} micro-batches for {stages} stages: most of a step is waiting; a larger data.global_batch_tokens helps")
    whole = build_ledger(asked.with_parts(parallel=replace(asked.parallel, pipeline=PipelineConfig())))
    took = f"a step would take {format_seconds(whole.timing.step_s)}, {whole.timing.step_s / ledger.timing.step_s:.2f} x as long"
    fits = "and fits" if whole.fits else "and does not fit"
    return [*lines, f"without stages (parallel.pipeline.stages=1) {took}, {fits}"]


def _model(config: Config, ledger: Ledger) -> dict[str, Any]:
    spec = ledger.asked.spec
    return {
        "name": config.model.name,
        "family": spec.family.value,
        "parameters": ledger.asked.parameters,
        "trained_parameters": ledger.asked.trained_parameters,
        "layers": spec.num_layers,
        "hidden_size": spec.hidden_size,
        "heads": spec.num_heads,
        "kv_heads": spec.num_kv_heads,
        **({} if spec.experts is None else _experts(ledger, spec.experts)),
    }


def _experts(ledger: Ledger, experts: ExpertSizes) -> dict[str, Any]:
    return {
        "experts": experts.num_experts,
        "experts_per_token": experts.per_token,
        "expert_layers": ledger.inputs.spec.expert_layers,
        "expert_parallel": ledger.inputs.expert_parallel,
        **({"expert_order": _expert_order(ledger.inputs)} if ledger.inputs.expert_parallel > 1 else {}),
        "active_parameters": matrix_parameters(ledger.asked),
    }


def _expert_order(inputs: PlanInputs) -> dict[str, Any]:
    """Chunks of rows to experts in both directions, and what the model has hidden of their exchanges."""
    chosen = expert_order(inputs)
    forward, backward = chosen.order.forward, chosen.order.backward
    return {
        "forward_degree": forward.degree,
        "backward_degree": backward.degree,
        "defers_weights": backward.defers_weights,
        "hidden_share": chosen.hidden_share,
        "digest": chosen.order.digest,
    }


def _layout(ledger: Ledger) -> dict[str, Any]:
    layout = ledger.layout
    return {
        "world_size": layout.world_size,
        "num_nodes": layout.num_nodes,
        "ranks_per_node": layout.ranks_per_node,
        "replicate": layout.replicate,
        "shard": layout.shard,
        "sp_degree": layout.sp_degree,
        "ulysses": layout.ulysses,
        "ring": layout.ring,
        "groups_per_micro_batch": layout.num_groups,
        "micro_batches_per_step": layout.num_micro_batches,
        "tokens_per_rank": layout.tokens_per_rank,
        "grad_reduce": ledger.inputs.parallel.grad_reduce.value,
    }


def _pipeline(ledger: Ledger) -> dict[str, Any] | None:
    """The stages, None where there is one; layers are numbers of the first and the last of each virtual stage, both in."""
    if not ledger.stages:
        return None
    return {
        "order": ledger.asked.parallel.pipeline.order.value,
        "ranks_per_stage": ledger.layout.stage_size,
        "bubble": ledger.timing.bubble_s / ledger.timing.step_s,
        "stages": [
            {
                "layers": [[part.start, part.stop - 1] for part in stage.layers],
                "in_flight": stage.in_flight,
                "peak_bytes": stage.peak_bytes,
                "micro_batch_s": stage.seconds,
            }
            for stage in ledger.stages
        ],
    }


def _account(account: Account) -> dict[str, Any]:
    return {
        "name": account.name,
        "capacity_bytes": account.capacity_bytes,
        "reserve_bytes": account.reserve_bytes,
        "peak_bytes": account.peak_bytes,
        "peak_phase": account.peak_phase.value,
        "fits": account.fits,
        "largest_term": account.largest.name,
        "terms": [
            {
                "name": entry.name,
                "bytes": entry.num_bytes,
                "bytes_at_peak": entry.by_phase.get(account.peak_phase, 0),
                "by_phase": {phase.value: num_bytes for phase, num_bytes in entry.by_phase.items()},
                "note": entry.note,
            }
            for entry in account.terms
        ],
    }


def _step(timing: Timing) -> dict[str, Any]:
    return {
        "tokens": timing.tokens,
        "flops": timing.flops,
        "attention_flops": timing.attention_flops,
        "linear_flops": timing.linear_flops,
        "model_flops": timing.model_flops,
        "time_s": timing.step_s,
        "compute_s": timing.compute_s,
        "sequence_s": timing.sequence_s,
        "experts_s": timing.experts_s,
        "sharding_s": timing.sharding_s,
        "host_s": timing.host_s,
        "update_s": timing.update_s,
        "bubble_s": timing.bubble_s,
        "tokens_per_s": timing.tokens_per_s,
        "assumptions": list(timing.assumptions),
    }


def _rates(ledger: Ledger) -> dict[str, Any]:
    """Bytes per second that the times of copies and updates rest on, of one rank."""
    way, on_device, on_host = offload_link(ledger.inputs), device_update_rate(ledger.inputs), host_update_rate(ledger.inputs)
    return {
        "out": way.out,
        "back": way.back,
        "both": way.both,
        "source": way.source,
        "device_update": on_device.bytes_per_s,
        "device_update_source": on_device.source,
        "host_update": on_host.bytes_per_s,
        "host_update_source": on_host.source,
    }


def _policy(ledger: Ledger) -> dict[str, Any]:
    policy = ledger.inputs.policy
    clauses = list(describe_policy(policy, ledger.inputs))
    return {
        "description": "; ".join(clauses),
        "words": clauses,
        "graph": policy.graph,
        "classes": {name: {"keep": split.keep, "host": split.host} for name, split in class_splits(ledger.inputs).items()},
        "segment_layers": policy.segment_layers,
        "chunk_tokens": policy.chunk_tokens,
        "attention": policy.attention.value,
        "head_groups": policy.head_groups,
    }


def _train_stages(config: Config, ledger: Ledger) -> dict[str, Any]:
    """A row for each stage of train.stages; nothing without."""
    stages = train_stages(config.train, config.data)
    plans = stage_plans(ledger, [stage.data for stage in stages])
    rows = [
        {
            "steps": stage.steps,
            "max_seq_len": stage.data.max_seq_len,
            "global_batch_tokens": stage.data.global_batch_tokens,
            "device_bytes": own.ledger.device.peak_bytes,
            "host_bytes": own.ledger.host.peak_bytes,
            "time_s": own.ledger.timing.step_s,
        }
        for stage, own in zip(stages, plans, strict=True)
    ]
    return {"train_stages": rows} if rows else {}


def _solver(report: SolveReport | None) -> dict[str, Any] | None:
    if report is None:
        return None
    return {
        "feasible": report.feasible,
        "gap": report.gap,
        "shapes": report.num_shapes,
        "shapes_solved": report.num_solved,
        "binding": list(report.binding),
        "prices": [
            {"change": price.change, "saved_s": price.saved_s, "saved_share": price.saved_share, "slope_s": price.slope_s}
            for price in report.prices
        ],
        "keep_s": report.keep_s,
        "recompute_s": report.recompute_s,
        "fixed_bytes": report.fixed_bytes,
        "fixed_terms": dict(report.fixed_terms),
        "least_budget": report.least_budget,
    }


def _certificate(ledger: Ledger) -> dict[str, Any]:
    certificate = certify(ledger)
    return {
        "device_bytes": certificate.device_bytes,
        "host_bytes": certificate.host_bytes,
        "comparable_bytes": certificate.comparable_bytes,
        "compared": certificate.compared,
        "assumptions": list(certificate.assumptions),
        "record": RECORD,
    }


def _suggestion(entry: Suggestion) -> dict[str, Any]:
    return {
        "overrides": list(entry.overrides),
        "reason": entry.reason,
        "device_peak_bytes": entry.ledger.device.peak_bytes,
        "host_peak_bytes": entry.ledger.host.peak_bytes,
        "time_s": entry.ledger.timing.step_s,
    }
