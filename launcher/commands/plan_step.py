"""`efflaunch plan ... --lengths`: one step of given lengths, planned and explained before anything runs. Imports no torch."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from ...errors import EXIT_DONE
from ...training.data.lengths import open_lengths
from ...units import format_precise
from ..config.run_config import Config
from .sequence_plan import certified, draw_step, explain_plan, explanation_dict, plan_name, plan_step, step_cost


@dataclass(frozen=True, kw_only=True, slots=True)
class PlanStepRequest:
    """Parsed command line of `efflaunch plan` for one step: which to plan, and what to print or draw."""

    lengths: str
    sequences: int | None
    """Number of sequences; None: a whole file, or as many as data.global_batch_tokens takes."""
    seed: int
    certify_s: float | None
    """Seconds to look for a tighter bound."""
    out: Path | None
    """File to draw the step into; None: it is not drawn."""


def print_step_plan(config: Config, request: PlanStepRequest, *, as_json: bool) -> int:
    """Print the plan of one step of these lengths. Keys of the JSON: docs/sequence.md."""
    cost = step_cost(config)
    lengths = draw_step_lengths(config, request.lengths, request.sequences, request.seed)
    explanation = explain_plan(config, certified(plan_step(config, lengths, cost), cost, request.certify_s), cost)
    title = f"{config.model.name}, lengths of {request.lengths}"
    if request.out is not None:
        draw_step(explanation, title, request.out)
    if as_json:
        facts = {"experiment": config.experiment, "lengths": request.lengths, "seed": request.seed, "cost_source": cost.source}
        print(json.dumps({**facts, **explanation_dict(explanation)}, indent=1))
        return EXIT_DONE
    from .sequence_view import show_explanation

    size = f"{len(lengths):,} sequences, {sum(lengths):,} tokens on {cost.world_size} ranks"
    show_explanation(explanation, f"{title}: {size}, {plan_name(explanation)}, modelled {format_precise(explanation.line.step_s)}")
    if request.out is not None:
        print(f"wrote {request.out}")
    return EXIT_DONE


def draw_step_lengths(config: Config, text: str, sequences: int | None, seed: int) -> tuple[int, ...]:
    """Lengths of one step: `sequences` of them, a whole file, or as many as data.global_batch_tokens takes."""
    source = open_lengths(text, max_seq_len=config.data.max_seq_len)
    if sequences is not None:
        return tuple(source.draw(sequences, seed).tolist())
    if source.whole is not None and not text.endswith(".idx"):
        return tuple(source.whole.tolist())
    return tuple(source.draw_tokens(config.data.global_batch_tokens, seed).tolist())
