"""Section of docs/benchmarks.md about launchers."""

from __future__ import annotations

from typing import Any

_METRICS = {
    "start_s": "command to first step",
    "rank_death_s": "a rank killed to next step",
    "node_death_s": "a node without power to next step",
    "stop_s": "stop signal to end",
}


def launch(result: dict[str, Any]) -> list[str]:
    """A row per contestant; what bare torch elastic takes is in brackets as a difference."""
    lines = [
        "## Launchers",
        "",
        f"Seconds of {result['ranks']} gloo ranks on one machine (on SLURM and Ray as many nodes, each a namespace), "
        f"{result['rounds']} interleaved rounds:",
        "median / minimum, and the median difference to bare torch elastic in the same round. The peer trains a plain model of the",
        "same sizes and saves nothing: after a death it begins again at step 1, at a stop signal it just ends. Ours resume from the last",
        "checkpoint, and save before they end. A node's death includes the time its scheduler takes to notice it.",
        "",
        f"| | {' | '.join(_METRICS.values())} |",
        f"|---|{'---|' * len(_METRICS)}",
    ]
    for name, row in result["contestants"].items():
        label = "bare torch elastic" if name == "elastic" else f"`launcher={name}`"
        lines.append(f"| {label} | {' | '.join(_cell(row.get(metric)) for metric in _METRICS)} |")
    lines += [f"- {name} was not measured: {reason}" for name, reason in result["skipped"].items()]
    return lines + [f"- failed: {text.splitlines()[0]}" for text in result["failures"]]


def _cell(times: dict[str, float] | None) -> str:
    if times is None:
        return ""
    over = f" ({times['over_elastic']:+.1f})" if "over_elastic" in times else ""
    return f"{times['median']:.1f} / {times['min']:.1f}{over}"
