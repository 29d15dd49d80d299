"""`efflaunch plan ... --lengths`: one step of given lengths, planned and explained before anything runs. Imports no torch."""

from __future__ import annotations

import json
from pathlib import Path

from ..errors import EXIT_DONE
from ..parallel.sequence.lengths import open_lengths
from ..units import format_precise
from .config import Config
from .sequence_plan import draw_step, explain_plan, explanation_dict, plan_step, step_cost


def main(config: Config, text: str, *, sequences: int | None, seed: int, out: Path | None, as_json: bool) -> int:
    """Print the plan of one step of these lengths; with `out`, draw it. Keys of the JSON: docs/sequence.md."""
    cost = step_cost(config)
    lengths = draw_step_lengths(config, text, sequences, seed)
    found = explain_plan(config, plan_step(config, lengths, cost), cost)
    title = f"{config.model.name}, lengths of {text}"
    if out is not None:
        draw_step(found, title, out)
    if as_json:
        facts = {"experiment": config.experiment, "lengths": text, "seed": seed, "cost_source": cost.source}
        print(json.dumps({**facts, **explanation_dict(found)}, indent=1))
        return EXIT_DONE
    from .sequence_view import show_explanation

    size = f"{len(lengths):,} sequences, {sum(lengths):,} tokens on {cost.world_size} ranks"
    show_explanation(found, f"{title}: {size}, {found.plan.source} plan, modelled {format_precise(found.line.step_s)}")
    if out is not None:
        print(f"wrote {out}")
    return EXIT_DONE


def draw_step_lengths(config: Config, text: str, sequences: int | None, seed: int) -> tuple[int, ...]:
    """Lengths of one step: `sequences` of them, a whole file, or as many as data.global_batch_tokens takes."""
    source = open_lengths(text, max_seq_len=config.data.max_seq_len)
    if sequences is not None:
        return tuple(source.draw(sequences, seed).tolist())
    if source.whole is not None and not text.endswith(".idx"):
        return tuple(source.whole.tolist())
    return tuple(source.draw_tokens(config.data.global_batch_tokens, seed).tolist())
