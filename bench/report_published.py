"""The section of docs/benchmarks.md about published runs of other systems."""

from __future__ import annotations

from typing import Any

GB = 1e9


def published(result: dict[str, Any]) -> list[str]:
    """A row per run: what its authors published and what we plan for it."""
    rows, limits, aims = result["rows"], result.get("limits", []), result["aims"]
    lines = [
        "## Published runs beside our plans",
        "",
        "Runs of other systems on H100 SXM 80 GB (the last: H200), planned by `efflaunch` **as their authors ran them**: their kernel,",
        "everything recomputed, layer inputs on the host from 2.4M on and in TRL. Nothing was run here: the rows judge our cost model and",
        "ledger. Figures of a draft, whose author corrected the series later (364 s became 380), are summed up apart, and their memory not",
        "at all.",
        "",
        f"Time: {_error(result, 'time')}; memory: {_error(result, 'memory')} "
        f"(aims: median {aims['median']:.0%}, worst {aims['worst']:.0%}). Drafts: {_error(result, 'time', '_drafts')}.",
        "",
        "| run | GPUs | kernel | published s | predicted s | error | published GB | predicted GB | in tiles | float32 states |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        name = f"[{row['name']}]({row['source']})" + " (draft)" * row["is_draft"]
        predicted = f"{row['predicted_s']:,.0f}"
        seconds = f"- | {predicted} | -" if row["step_s"] is None else f"{row['step_s']:,.0f} | {predicted} | {row['time_error']:+.0%}"
        theirs = "-" if row["memory_bytes"] is None else f"{row['memory_bytes'] / GB:.1f}"
        ours = " | ".join(f"{row[key] / GB:.1f}" for key in ("predicted_bytes", "tiled_bytes", "state_bytes"))
        lines.append(f"| {name} | {row['gpus']} | {row['kernel']} | {seconds} | {theirs} | {ours} |")
    rates = sorted({(row["kernel"], row["forward_flops"], row["backward_flops"]) for row in rows})
    kernels = ", ".join(f"{kernel} {forward / 1e12:.0f} and {backward / 1e12:.0f}" for kernel, forward, backward in rates)
    products = ", ".join(sorted({f"{row['gemm_efficiency']:.0%}" for row in rows}))
    told = [*rows, *limits]
    return [
        *lines,
        "",
        f"Attention runs at its kernel's published rates, forward and backward, in TFLOP/s: {kernels}",
        f"(`cluster/attention_rates.py` has the sources); products at {products} of the peak (`cluster.gemm_efficiency`). Nothing is",
        "fitted to a row. `in tiles`: our ledger with feed-forwards of 16K rows at a time; `float32 states`: 16 bytes a weight over the",
        "GPUs, part of both unless states are on the host. Where that alone is above what was published (Qwen3-32B, 30B-A3B), the authors'",
        "weights or moments were no float32, and with feed-forwards of all rows at once the rest would not fit either: they were in",
        "tiles or fused. ALST's rows give no memory.",
        "",
        *_limits(limits),
        *(f"- not said by {source}: {unsaid}" for source, unsaid in dict.fromkeys((row["source"], row["left_out"]) for row in told)),
    ]


def _limits(rows: list[dict[str, Any]]) -> list[str]:
    """A table of runs of which is only known that they fitted; nothing without any."""
    if not rows:
        return []
    lines = [
        f"Of these is only published that they fitted, and of some a share of the peak; {sum(row['fits'] for row in rows)} of {len(rows)} "
        "fit by our ledger under",
        "their own policy. They are in no error above: authors differ in which pairs of attention they count, ours are those that a",
        "causal mask leaves.",
        "",
        "| run | GPUs | predicted GB | of GB | published share | predicted share |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        memory = " | ".join(f"{row[key] / GB:.1f}" for key in ("predicted_bytes", "device_bytes"))
        share = "-" if row["mfu"] is None else f"{row['mfu']:.0%}"
        lines.append(f"| [{row['name']}]({row['source']}) | {row['gpus']} | {memory} | {share} | {row['predicted_utilisation']:.0%} |")
    return [*lines, ""]


def _error(result: dict[str, Any], what: str, of: str = "") -> str:
    """Both figures of one kind, or that no run has any."""
    median, worst = result[f"median_{what}_error{of}"], result[f"worst_{what}_error{of}"]
    return "nothing published" if median is None else f"**median_{what}_error{of} {median:.1%}**, worst_{what}_error{of} {worst:.1%}"
