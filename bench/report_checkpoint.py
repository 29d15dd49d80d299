"""Sections of docs/benchmarks.md about checkpoints."""

from __future__ import annotations

from typing import Any

_KEYS = {
    "stall_vs_sync": ("what training waits for ours over dcp.save's", 0.005, False),
    "stall_vs_async": ("over dcp.async_save's (threads)", 0.05, False),
    "durable_vs_raw": ("our rate until durable over raw direct writes", 0.7, True),
    "step_inflation": ("a step with ours behind it, longer by", 0.02, False),
    "step_inflation_training": ("the same inside real training on the processor", None, False),
    "restore_vs_dcp": ("our verified restore's speed over dcp.load's", 1.0, True),
    "hash_cost": ("durable later than without hashes by", 0.05, False),
    "hash_share": ("processor time of hashing over time until durable", None, False),
}


def checkpoint(result: dict[str, Any]) -> list[str]:
    """Ratios with their aims, then every contestant."""
    size = result["num_bytes"] / 1e9
    lines = [
        "## Checkpoints",
        "",
        f"{size:.2f} GB on {result['device']}, {result['rounds']} interleaved rounds, medians (minima in brackets).",
        "",
    ]
    lines += ["| ratio | found | aim |", "|---|---|---|"]
    for key, (name, aim, at_least) in _KEYS.items():
        if result.get(key) is not None:
            wanted = "" if aim is None else f"{'at least' if at_least else 'at most'} {aim:g}"
            lines.append(f"| {key}: {name} | {result[key]:.4f} | {wanted} |")
    lines += ["", "| | training waits, s | durable after, s | step, s |", "|---|---|---|---|"]
    for name, row in result["contestants"].items():
        cells = (f"{row[key]['median']:.4f} ({row[key]['min']:.4f})" for key in ("stall_s", "durable_s", "step_s"))
        lines.append(f"| {name} | {' | '.join(cells)} |")
    restores = ", ".join(f"{name} {row['median']:.2f} ({row['min']:.2f})" for name, row in result["restore"].items())
    return [*lines, "", f"Restore, s, caches dropped, ours with every hash checked: {restores}."]


def chaos(result: dict[str, Any]) -> list[str]:
    """Return the section on kills and damage: how much was tried, and the outcome."""
    counts = ", ".join(f"{key} **{result[key]}**" for key in ("lost", "torn", "silent", "failed"))
    asked = result["asked"]
    tried = f"{result['kills']} of {asked['kills']} kills, {result['faults']} of {asked['faults']} damaged checkpoints"
    memory = f"{result['restored_from_memory']} lives resumed from memory (checkpoint.replica=peer), the rest from disk."
    kinds = {kind: number for tally in result["tallies"].values() for kind, number in tally["by_kind"].items()}
    lines = ["## Checkpoints under kills and damage", "", f"{tried}: {counts}. {memory}", "", "| trial | number |", "|---|---|"]
    return [*lines, *(f"| {kind} | {number} |" for kind, number in sorted(kinds.items()))]
