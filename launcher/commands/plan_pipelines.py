"""`efflaunch plan --pipelines`: every way to cut the model into stages that this version runs, the fastest that fits first. No torch."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from ...errors import EXIT_DONE
from ...estimate.plan_inputs import GIB
from ...units import format_seconds
from ..config.pipeline_choice import PipelineTrial, try_pipelines
from ..config.run_config import Config


def print_pipelines(config: Config, as_json: bool) -> int:
    """Print what each way takes and holds, as a table or as JSON (keys: docs/pipelines.md); the stages of `config` do not matter."""
    trials = try_pipelines(config)
    if as_json:
        print(json.dumps({"pipelines": [trial_dict(trial) for trial in trials]}, indent=2))
        return EXIT_DONE
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False, soft_wrap=True)
    if not console.is_terminal:
        console = Console(highlight=False, soft_wrap=True, width=160)
    table = Table(title=f"pipelines for {config.experiment}, the best first (estimates)", title_justify="left", title_style="bold")
    for name, right in (("step", True), ("waiting", True), ("GiB a rank", True), ("as typed", False), ("", False)):
        table.add_column(name, justify="right" if right else "left")
    for row in rows(trials):
        table.add_row(*row)
    console.print(table)
    return EXIT_DONE


def rows(trials: Sequence[PipelineTrial]) -> list[tuple[str, ...]]:
    """Build the cells of the table."""
    found: list[tuple[str, ...]] = []
    for trial in trials:
        if trial.ledger is None:
            found.append(("-", "-", "-", " ".join(trial.overrides), trial.reason))
            continue
        timing, device = trial.ledger.timing, trial.ledger.device
        waiting = f"{timing.bubble_s / timing.step_s:.1%}"
        verdict = "" if trial.fits else "does not fit"
        found.append((format_seconds(timing.step_s), waiting, f"{device.peak_bytes / GIB:.2f}", " ".join(trial.overrides), verdict))
    return found


def trial_dict(trial: PipelineTrial) -> dict[str, Any]:
    """The stable form of a trial; what was not planned has nulls, and a reason."""
    pipeline, ledger = trial.config.parallel.pipeline, trial.ledger
    return {
        "overrides": list(trial.overrides),
        "stages": pipeline.stages,
        "order": pipeline.order.value,
        "virtual": pipeline.virtual,
        "fits": trial.fits,
        "time_s": None if ledger is None else ledger.timing.step_s,
        "bubble": None if ledger is None else ledger.timing.bubble_s / ledger.timing.step_s,
        "peak_bytes": None if ledger is None else ledger.device.peak_bytes,
        "least_s": trial.least_s or None,
        "reason": trial.reason or None,
    }
