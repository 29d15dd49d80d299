"""The section of docs/benchmarks.md about published runs of other systems."""

from __future__ import annotations

from typing import Any

GB = 1e9


def published(result: dict[str, Any]) -> list[str]:
    """A row per run: what its authors published and what we plan for it."""
    rows, aims = result["rows"], result["aims"]
    lines = [
        "## Published runs beside our plans",
        "",
        "Runs of other systems on H100 SXM 80 GB, one sequence a step, planned by `efflaunch` **as their authors ran them**: everything",
        "recomputed, layer inputs on the host. Nothing was run here: the rows judge our cost model and ledger. Figures of a draft, whose",
        "author corrected the series later, are in no summary.",
        "",
        f"Time: {_error(result, 'time')}; memory: {_error(result, 'memory')} "
        f"(aims: median {aims['median']:.0%}, worst {aims['worst']:.0%}).",
        "",
        "| run | GPUs | kernel | published s | predicted s | error | published GB | predicted GB | in tiles | float32 states |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        name = f"[{row['name']}]({row['source']})" + " (draft)" * row["is_draft"]
        seconds = f"{row['step_s']:,.0f} | {row['predicted_s']:,.0f} | {row['time_error']:+.0%}"
        theirs = "-" if row["memory_bytes"] is None else f"{row['memory_bytes'] / GB:.1f}"
        ours = " | ".join(f"{row[key] / GB:.1f}" for key in ("predicted_bytes", "tiled_bytes", "state_bytes"))
        lines.append(f"| {name} | {row['gpus']} | {row['kernel']} | {seconds} | {theirs} | {ours} |")
    efficiencies = ", ".join(sorted({f"{row['efficiency']:.0%}" for row in rows}))
    return [
        *lines,
        "",
        f"Plans take attention and products to run at {efficiencies} of the GPUs' peak whatever the kernel (`cluster.efficiency`). That",
        "figure was taken from runs with FlashAttention 2 as ALST's are: those rows agree by choice, and the others show what it leaves",
        "out. `in tiles`: our ledger with feed-forwards of 16K rows at a time; `float32 states`: 16 bytes a weight over the GPUs, part of",
        "both predictions. Where that alone is above what was published, the authors' weights or moments were no float32.",
        "",
        *(f"- not said by {source}: {unsaid}" for source, unsaid in dict.fromkeys((row["source"], row["left_out"]) for row in rows)),
    ]


def _error(result: dict[str, Any], what: str) -> str:
    """Both figures of one kind, or that no run has any."""
    median, worst = result[f"median_{what}_error"], result[f"worst_{what}_error"]
    return "nothing published" if median is None else f"**median_{what}_error {median:.1%}**, worst_{what}_error {worst:.1%}"
