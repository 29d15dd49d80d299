"""Section of docs/benchmarks.md about schedules of pipelines."""

from __future__ import annotations

from typing import Any

_NAMES = {
    ("gpipe", 1): "GPipe",
    ("1f1b", 1): "1F1B",
    ("zero_bubble", 1): "zero bubble (ZB-H1)",
    ("interleaved", 2): "interleaved, 2 stages a rank",
    ("zbv", 2): "ZBV",
    ("dual_pipe_v", 2): "DualPipeV",
    ("sliced_1f1b", 1): "1F1B of slices",
    ("sliced interleaved", 2): "interleaved slices, 2 stages a rank",
}
_MEASURED = ("predicted_vs_measured", "vs_torch_equal", "vs_torch_padded")


def pipeline(result: dict[str, Any]) -> list[str]:
    """GPipe's table, schedules of long sequences by length, and the search's time."""
    simulated = result["simulated"]
    lines = [
        "## Schedules of pipelines, simulated",
        "",
        "**Simulated, not measured**, but for the search's time and what is said to have run: the cost model of "
        "[pipelines.md](pipelines.md).",
        *_not_measured(result),
        *_measured(result),
        "",
        *_gpipe(simulated["gpipe_table"]),
    ]
    for tokens in dict.fromkeys(row["tokens"] for row in simulated["long_context"]):
        lines += ["", *_length(tokens, [row for row in simulated["long_context"] if row["tokens"] == tokens])]
    lines += ["", *(f"- {key}: {value}" for key, value in result["summary"].items())]
    lines += ["", "Published, on other machines and against other baselines:", ""]
    lines += [f"- {name}: {claim}" for name, claim in result["published"].items()]
    return [*lines, "", *(_search(row) for row in simulated["search"])]


def _not_measured(result: dict[str, Any]) -> list[str]:
    missing = [f"`{key}`" for key in _MEASURED if result.get(key) is None]
    return [f"Nothing ran: {', '.join(missing)} are empty."] if missing else []


def _measured(result: dict[str, Any]) -> list[str]:
    """What ran: sleeping ranks against the simulation, and a small model against torch's."""
    if any(result.get(key) is None for key in _MEASURED):
        return []
    slept, equal, padded = (result[key] for key in _MEASURED)
    return [
        "",
        f"Run on {slept['ranks']} gloo ranks that sleep in place of computing, {slept['micro_batches']} unequal micro-batches: seconds of",
        f"a step, predicted / measured (worst error {slept['worst_error']:.1%}, aim below {slept['aim']:.0%}): "
        + ", ".join(f"{row['order']} {row['predicted_s']:.2f} / {row['measured_s']:.2f}" for row in slept["rows"])
        + ".",
        "",
        "A small Llama in two stages on two CPU ranks, tokens/s over torch.distributed.pipelining's 1F1B on Hugging Face's layers:",
        f"{equal['speed_over_torch']:.2f} x with equal micro-batches, {padded['speed_over_torch']:.2f} x with long-tailed ones, which",
        "torch's pads to the longest.",
    ]


def _gpipe(rows: list[dict[str, Any]]) -> list[str]:
    lines = [
        "GPipe with equal stages: throughput over 2 stages and 1 micro-batch, simulated / published for Transformer-48 / for AmoebaNet-D.",
        "The model has the bubble alone; published batches were adjusted to memory, so cells differ in more. AmoebaNet is hard to cut",
        "evenly.",
        "",
        "| micro-batches | " + " | ".join(f"{stages} stages" for stages in dict.fromkeys(row["stages"] for row in rows)) + " |",
    ]
    lines.append("|" + "---|" * (lines[-1].count("|") - 1))
    for batches in dict.fromkeys(row["micro_batches"] for row in rows):
        cells = [
            f"{row['throughput']:.2f} / {row['published_transformer']:g} / {row['published_amoebanet']:g}"
            for row in rows
            if row["micro_batches"] == batches
        ]
        lines.append(f"| {batches} | {' | '.join(cells)} |")
    return lines


def _length(tokens: int, rows: list[dict[str, Any]]) -> list[str]:
    counts = list(dict.fromkeys(row["stages"] for row in rows))
    lines = [
        f"Llama 70B, sequences of {tokens >> 10}K tokens, 4M tokens a step, 256 H100: seconds a step / idle / GiB at most on a rank.",
        "GPUs of a stage share each sequence. A star: some stages recompute (all but attention, or more).",
        "",
        "| schedule | " + " | ".join(f"{count} stages" for count in counts) + " |",
        "|---|" + "---|" * len(counts),
    ]
    for key in sorted({(row["schedule"], row["virtual_stages"], row["slices"]) for row in rows}, key=_place):
        name, virtual, slices = key
        at = {row["stages"]: row for row in rows if (row["schedule"], row["virtual_stages"], row["slices"]) == key}
        words = _NAMES.get((name, virtual), f"{name}, {virtual} stages a rank") + f", {slices}" * (slices > 1)
        lines.append(f"| {words} | {' | '.join(_cell(at.get(count)) for count in counts)} |")
    return lines


def _place(key: tuple[str, int, int]) -> tuple[int, str, int]:
    names = list(_NAMES)
    return (names.index(key[:2]) if key[:2] in names else len(names), key[0], key[2])


def _cell(row: dict[str, Any] | None) -> str:
    if row is None:
        return "-"
    if not row["fits"]:
        return "does not fit"
    ways = "" if list(row["recompute"]) == ["none"] else " *"
    return f"{row['step_s']:.0f} / {row['bubble']:.0%} / {row['peak_gib']:.0f}{ways}"


def _search(row: dict[str, Any]) -> str:
    sizes = f"{row['stages']} stages x {row['micro_batches']} micro-batches, {row['batch']}"
    what = f"The search, {sizes}: {row['search_s']:.2f} s of processor"
    if "refused" in row:
        return f"- {what}; nothing fits"
    return f"- {what} (aim: below 2), {row['tried']} candidates, kept {row['kept']}, {row['gap']:.0%} above the lower bound"
