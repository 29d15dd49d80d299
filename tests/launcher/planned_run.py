"""A run directory with a corpus and metrics, as training leaves it, without training."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from efflaunch.launcher.commands.explain import step_lengths
from efflaunch.launcher.commands.sequence_plan import plan_step, step_cost
from efflaunch.launcher.config.compose import compose
from efflaunch.launcher.config.run_config import Config
from efflaunch.launcher.rundir.run_dir import write_run
from efflaunch.parallel.sequence.plan import StepPlan
from efflaunch.tests.data.corpora import write_corpus

STEPS = 3
OVERHEAD_S = 0.25
"""What training counts to every group beside its sequences."""


def make_run(directory: Path, *overrides: str, recorded: bool = True) -> tuple[Path, Config, list[StepPlan]]:
    """RUN_DIR, its configuration and the plans of its steps; `recorded`: metrics.jsonl holds them, else only their text."""
    run_dir = directory / "runs" / "mine"
    run_dir.mkdir(parents=True)
    lengths = np.random.default_rng(0).lognormal(np.log(300), 1.3, 400).astype(int).clip(2, 8000)
    prefix = write_corpus(directory / "corpus", [[1] * n for n in lengths.tolist()])
    config = compose(
        ["+experiment=quickstart", "data=indexed", f"data.prefixes=[{prefix}]", "data.max_seq_len=8K", "data.global_batch_tokens=16K"]
        + [f"train.steps={STEPS}", "optim.warmup_steps=0", "run.id=mine", *overrides]
    )
    write_run(run_dir, config, 1)
    cost = step_cost(config)
    plans = [plan_step(config, step_lengths(config, step, Path(prefix).parent), cost) for step in range(1, STEPS + 1)]
    lines = [
        json.dumps(
            {
                "event": "start",
                "step": 0,
                "steps": len(plans),
                "world_size": 4,
                "parameters": 1,
                "plan": "layout",
                **({"cost_model": asdict(cost)} if recorded else {}),
            }
        )
    ]
    lines += [json.dumps(step_event(step, plan, recorded)) for step, plan in enumerate(plans[:-1], 1)]
    (run_dir / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    return run_dir, config, plans


def step_event(step: int, plan: StepPlan, recorded: bool) -> dict[str, Any]:
    """What training writes of a step: the last one's line is not there yet."""
    event: dict[str, Any] = {"event": "step", "step": step, "loss": 1.0, "step_s": 1.5 * step, "plan": str(plan), "planned_by": plan.source}
    if recorded:
        event["groups"] = [
            {
                "micro_batch": index,
                "first_rank": group.first_rank,
                "degree": group.degree,
                "ulysses": group.ulysses,
                "sequences": list(group.sequences),
                "lengths": [plan.lengths[i] for i in group.sequences],
                "predicted_s": (group.predicted_s or 0.0) + OVERHEAD_S,
                "measured_s": 2.0 * (group.predicted_s or 0.0) + OVERHEAD_S,
            }
            for index, batch in enumerate(plan.micro_batches)
            for group in batch.groups
        ]
    return event
