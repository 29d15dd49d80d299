"""Builds what a step's event says of each source of a mix: its share and epochs so far, and its loss."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..data.source import DataSource
from ..objectives.heads import StepObjective


def source_fields(source: DataSource, step: int, objective: StepObjective, sums: Sequence[float]) -> dict[str, Any]:
    """Entry `sources` of the event of step `step` (from 0); nothing without data.sources. `sums`: the objective's, over all ranks."""
    usage = source.usage(step + 1)
    if not usage:
        return {}
    # Of objectives other than language modelling there are none.
    own = sums[len(objective.names) :]
    losses, targets = own[: len(usage)], own[len(usage) :]
    rows = []
    for index, use in enumerate(usage):
        row: dict[str, Any] = {"name": use.name, "tokens": use.tokens, "share": use.share, "epochs": use.epochs}
        if own:
            row |= {"targets": int(targets[index]), "loss": losses[index] / targets[index] if targets[index] else None}
        rows.append(row)
    return {"sources": rows}
