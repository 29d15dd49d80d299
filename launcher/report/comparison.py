"""Puts runs side by side: what became of each, and the settings in which they differ. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .facts import RunFacts, newest_metrics, settings

_OWN_KEYS = ("run.id", "run.root")
"""Settings that name a run, and so differ in any case."""


def compared(runs: Sequence[RunFacts]) -> dict[str, Any]:
    """`runs` (a mapping each) and `settings` (key to each run's value, where they are not all alike)."""
    return {"runs": [_row(facts) for facts in runs], "settings": differences([settings(facts.config) for facts in runs])}


def _row(facts: RunFacts) -> dict[str, Any]:
    progress = facts.progress
    best = progress.best
    return {
        "run": str(facts.run_dir),
        "state": facts.state,
        "step": progress.step,
        "steps": facts.config.train.steps,
        "loss": progress.losses.get(progress.step),
        "tokens": progress.total_tokens,
        "tokens_per_s": facts.median("tokens_per_s"),
        "device_tokens_per_s": facts.median("device_tokens_per_s"),
        "mfu": facts.median("mfu"),
        "hfu": facts.median("hfu"),
        "peak_bytes": max(progress.peak_bytes.values(), default=None),
        "trained_s": sum(progress.durations.values()),
        "attempts": len(facts.attempts),
        "best": None if best is None else {"metric": best["metric"], "value": best.get("value"), "step": best["step"]},
        "evaluations": newest_metrics(facts),
    }


def differences(configs: Sequence[Mapping[str, str]]) -> dict[str, list[str | None]]:
    """Values by key, one for each configuration, of the keys that are not alike in all; None: it has no such key."""
    keys = dict.fromkeys(key for config in configs for key in config if key not in _OWN_KEYS)
    values = {key: [config.get(key) for config in configs] for key in keys}
    return {key: row for key, row in values.items() if len(set(row)) > 1}
