"""Sections of docs/benchmarks.md about schedules of experts."""

from __future__ import annotations

from typing import Any

_NAMES = {
    "sequential": "sequential, as DeepSpeed-MoE",
    "tutel": "Tutel, best degree",
    "tutel_overlap": "Tutel, gradients beside attention",
    "lina": "Tutel's chunks, gradients in 30 MB pieces as Lina",
    "fsmoe_one_stream": "FSMoE, all communication on one stream",
    "fsmoe": "FSMoE",
    "flowmoe": "FlowMoE",
    "ours_whole": "**ours, the batch whole**",
    "ours": "**ours**",
}


def experts(result: dict[str, Any]) -> list[str]:
    """A row per scheduler, a column per testbed and contention."""
    columns = [(contention, testbed) for contention in ("calibrated", "ideal") for testbed in ("A", "B") if testbed in result[contention]]
    lines = [
        "## Schedules of experts, simulated",
        "",
        f"FSMoE's sweep (arXiv 2501.10714) on its testbeds A (6 x 8 A6000) and B (8 x 4 RTX 2080 Ti): "
        f"{result['calibrated'][columns[0][1]]['layers']:,} kinds of layers on each,",
        f"{result['layers']} equal ones in a row, forward and backward.",
        "**Simulated, not measured**: every schedule, the peers' too, runs in one cost model fitted to that paper's Table 2",
        "([expert_schedules.md](expert_schedules.md)). With `calibrated` contention links slow each other and compute down, with `ideal`",
        "none does.",
        "A peer is its fastest schedule in the model.",
        "",
        *(_headline(contention, result) for contention in ("calibrated", "ideal")),
        "",
        "Mean speed-up over Tutel / times the lower bound of schedules that leave the batch whole / of every schedule (geometric means;",
        "half-batches may be under the first bound).",
        "",
        f"| schedule | {' | '.join(f'{contention} {testbed}' for contention, testbed in columns)} |",
        f"|---|{'---|' * len(columns)}",
    ]
    for name, label in _NAMES.items():
        rows = [result[contention][testbed]["schedulers"][name] for contention, testbed in columns]
        cells = (f"{row['over_tutel']:.3f} / {row['times_whole_lower']:.3f} / {row['times_lower']:.3f}" for row in rows)
        lines.append(f"| {label} | {' | '.join(cells)} |")
    return lines


def _headline(contention: str, result: dict[str, Any]) -> str:
    figures, aims = result[contention], result["targets"][contention]
    return (
        f"- {contention}: **mean_over_tutel {figures['mean_over_tutel']:.3f}** (aim {aims['ours']:g}), without half-batches "
        f"{figures['mean_over_tutel_whole']:.3f} (aim {aims['ours_whole']:g}); **mean_over_fsmoe {figures['mean_over_fsmoe']:.3f}**, "
        f"least_over_fsmoe {figures['least_over_fsmoe']:.3f}; mean_over_flowmoe {figures['mean_over_flowmoe']:.3f}, least_over_flowmoe "
        f"{figures['least_over_flowmoe']:.3f}; schedules under a bound: {figures['under_a_bound']}; a plan took "
        f"{1e3 * figures['plan_s_p50']:.1f} ms (median, processor time)."
    )


def experts_throttled(result: dict[str, Any]) -> list[str]:
    """A row per schedule that real ranks executed over throttled links."""
    inverted = ", ".join(" / ".join(pair) for pair in result["inverted_pairs"]) or "none"
    lines = [
        "## Schedules of experts on throttled links",
        "",
        f"Plans of {result['layers']} layers executed by {result['ranks']} gloo ranks: every stream is a thread that sleeps what a task",
        f"takes in the cost model (x {result['scale']:g}, no contention) and makes its real collective with a few numbers. Ranks met in",
        f"the same collectives and reduced every gradient once. Fastest of {result['rounds']} round(s); a busy machine wakes them late.",
        "",
        f"**worst_error {result['worst_error']:.1%}** (aim {result['aim']:.0%} or less), "
        f"pairs in another order than predicted: {inverted}.",
        "",
        "| schedule | tasks | predicted s | measured s | measured / predicted |",
        "|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        figures = f"{row['predicted_s']:.2f} | {row['measured_s']:.2f} | {row['measured_s'] / row['predicted_s']:.3f}"
        lines.append(f"| {_NAMES[row['schedule']]} | {row['tasks']} | {figures} |")
    return lines
