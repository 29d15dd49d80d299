"""`python -m efflaunch.bench.report DIR docs/benchmarks.md`: write the page of figures from the benchmarks' JSON files."""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

from . import (
    report_adapters,
    report_checkpoint,
    report_engines,
    report_experts,
    report_fuzz,
    report_launch,
    report_memory,
    report_pipeline,
    report_published,
)

HEADER = """# Benchmarks

Written by `python -m efflaunch.bench.report DIR docs/benchmarks.md` from the JSON files of the programs in `bench/`.
Do not edit: run a benchmark again with `--json`, then the command above.
"""
MIB = 1 << 20


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m efflaunch.bench.report", description=__doc__)
    parser.add_argument("folder", type=Path, help="where the JSON files are")
    parser.add_argument("page", type=Path, help="the page to write")
    options = parser.parse_args(arguments)
    results = [json.loads(file.read_text()) for file in sorted(options.folder.glob("*.json"))]
    reported = [result for result in results if result.get("benchmark") in SECTIONS]
    if not reported:
        parser.error(f"no result of a known benchmark ({', '.join(SECTIONS)}) in {options.folder}")
    options.page.write_text(page(reported))
    print(f"{len(reported)} benchmarks -> {options.page}")
    return 0


def page(results: list[dict[str, Any]]) -> str:
    """The whole page, one section per result."""
    return "\n".join([HEADER, *(section(result) for result in results)])


def section(result: dict[str, Any]) -> str:
    """Title, figures, and where they come from."""
    return "\n".join([*SECTIONS[result["benchmark"]](result), "", *_origin(result), ""])


def _origin(result: dict[str, Any]) -> list[str]:
    machine, versions = result["machine"], result["versions"]
    return [
        f"- machine: {machine['processor']}, {machine['cores']} cores, {machine['system']}; load before: {machine['load_before']:.1f}",
        f"- versions: {', '.join(f'{name} {version}' for name, version in versions.items())}",
        f"- command: `{result['command']}`",
        f"- date: {result['date']}",
    ]


def _freed_blocks(result: dict[str, Any]) -> list[str]:
    """The price and the gain of giving freed blocks back, on a CPU rank."""
    rows = [
        f"| {index} | {row['own']['processor_s']:.1f} | {row['returned']['processor_s']:.1f} "
        f"| {row['own']['resident_bytes'] / MIB:.0f} | {row['returned']['resident_bytes'] / MIB:.0f} |"
        for index, row in enumerate(result["rounds"], 1)
    ]
    return [
        "## Freed blocks of a CPU rank",
        "",
        "A rank without a GPU has the C library give large freed blocks back (utils/c_allocator.py), so that the memory certificate holds.",
        f"Processor time {result['processor_ratio']:.2f} x, resident memory past the libraries {result['resident_ratio']:.2f} x (medians).",
        "",
        "| round | glibc's own, processor s | returned, processor s | own, resident MiB | returned, resident MiB |",
        "|---|---|---|---|---|",
        *rows,
    ]


def _experts_step(result: dict[str, Any]) -> list[str]:
    """A mixture of experts against Hugging Face's, on one CPU rank."""
    shape, rounds, peaks = result["shape"], result["rounds"], result["peak_bytes"]
    seconds = {way: statistics.median(row[way] for row in rounds) for way in peaks}
    rows = [f"| {way} | {seconds[way]:.3f} | {peaks[way] / shape['tokens'] / 1024:.1f} |" for way in peaks]
    return [
        "## A mixture of experts against Hugging Face's",
        "",
        f"One block, {shape['tokens']:,} tokens, {shape['experts']} experts of {shape['inner']}, {shape['per_token']} a token, hidden size "
        f"{shape['hidden']}, float32, one core: forward and backward, {len(rounds)} rounds in turns.",
        f"Speed over grouped_mm {result['speed_over_grouped']:.2f} (aim: 1.0 or more), over the loop {result['speed_over_eager']:.2f}; "
        f"peak with recompute over checkpointing {result['peak_over_checkpointing']:.2f} (aim: 0.5 or less).",
        "",
        "| | processor s (median) | peak KiB a token |",
        "|---|---|---|",
        *rows,
    ]


def _startup(result: dict[str, Any]) -> list[str]:
    names = {
        "help_s": "`efflaunch --help`",
        "plan_s": "`efflaunch plan +experiment=llama8b_1M`",
        "first_step_s": "quickstart, to its first step",
    }
    lines = ["## Start-up", "", "Seconds until the answer, in a fresh process with warm files; the median.", ""]
    lines += ["| what | seconds | aim below | each run |", "|---|---|---|---|"]
    for key, name in names.items():
        if key in result:
            runs = ", ".join(f"{value:.2f}" for value in result["seconds"][key])
            lines.append(f"| {name} | {result[key]:.2f} | {result['targets'][key]:g} | {runs} |")
    return lines


def _scale(result: dict[str, Any]) -> list[str]:
    lines = [
        "## Long runs and many checkpoints",
        "",
        f"`efflaunch status` on {result['steps']:,} steps, imports left out: the first look ever, then the next.",
        "",
    ]
    lines += [
        "| ranks | metrics.jsonl, MiB | first look, s | next look, s | bytes read again | peak memory, MiB |",
        "|---|---|---|---|---|---|",
    ]
    for row in result["looks"]:
        seconds = f"{row['status_s']:.2f} | {row['status_again_s']:.2f} | {row['bytes_again']:,}"
        lines.append(f"| {row['ranks']} | {row['file_bytes'] / MIB:.0f} | {seconds} | {row['peak_bytes'] / MIB:.0f} |")
    lines += ["", "A small save until it is durable and retention is done (median), and the checkpoints whose files it reads.", ""]
    lines += ["| checkpoints kept | ms a save | checkpoints looked at |", "|---|---|---|"]
    return [*lines, *(f"| {row['kept']} | {1000 * row['save_s']:.1f} | {row['inspected']:g} |" for row in result["saves"])]


def _step(result: dict[str, Any]) -> list[str]:
    lines = [
        "## One step against plain Hugging Face + torch",
        "",
        f"Same model, weights and packed tokens (documents of {', '.join(map(str, result['lengths']))} tokens on each rank),",
        f"float32, FSDP2 in all, {result['rounds']} interleaved rounds. `stock`: SDPA with `position_ids`; `varlen`: SDPA document",
        "by document, the stronger peer.",
        "Ratios are the median of the rounds' ratios; processor ratios count rank 0's processor seconds instead of wall time.",
        "",
        f"**throughput_ratio {result['throughput_ratio']:.3f}** (our worst case against the stronger peer; aim 0.97 or more), "
        f"processor_ratio {result['processor_ratio']:.3f} (the same in processor time: less disturbed by other work on the machine), "
        f"**peak_ratio {result['peak_ratio']:.3f}** (recompute against gradient checkpointing; aim 1.0 or less).",
        "",
        "| ranks | ours | peer | tokens/s, ours over peer | processor time, peer over ours | peak MiB, ours | peak MiB, peer |",
        "|---|---|---|---|---|---|---|",
    ]
    for ranks, row in result["ranks"].items():
        for policy, peers in row["ratios"].items():
            for peer, ratio in peers.items():
                ours, theirs = row["peak_bytes"][f"ours_{policy}"] / MIB, row["peak_bytes"][peer] / MIB
                processor = row["processor_ratios"][policy][peer]
                lines.append(
                    f"| {ranks} | {policy} | {peer.replace('_', ' + ')} | {ratio:.3f} | {processor:.3f} | {ours:.1f} | {theirs:.1f} |"
                )
    return lines


def _adaptive(result: dict[str, Any]) -> list[str]:
    lines = [
        "## Adaptive plans on real ranks",
        "",
        f"{result['ranks']} gloo ranks of this machine, real documents, {result['rounds']} steps; every plan runs the same documents in "
        "the same round. Wall seconds of a step's gradients; the model is the machine's profile, taken just before.",
        "",
        f"**speedup_vs_best_static {result['speedup_vs_best_static']:.3f}** against {result['best_static']} "
        f"({result['speedup_vs_best_static_modelled']:.3f} in the model); **prediction_error {result['prediction_error']:.1%}** of groups, "
        f"{result['step_prediction_error']:.1%} of whole steps (aim: below 6 %); a plan took {result['plan_s'] * 1e3:.0f} ms.",
        "",
        "| plan | seconds a step | modelled | processor seconds, all ranks | waiting | slower than adaptive |",
        "|---|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        factor = result["speedups"].get(row["plan"])
        slower = "" if factor is None else f"{factor:.3f} x"
        figures = f"{row['step_s']:.2f} | {row['predicted_s']:.2f} | {row['processor_s']:.2f} | {row['bubble']:.1%} | {slower}"
        lines.append(f"| {row['plan']} | {figures} |")
    lines += ["", "| ranks of a group | mean prediction error | error of the fit | r2 |", "|---|---|---|---|"]
    fits = {str(row["degree"]): row["fit"] for row in result["profile"]["degrees"]}
    for degree, error in result["prediction_error_by_degree"].items():
        lines.append(f"| {degree} | {error:.1%} | {fits[degree]['mean_error']:.1%} | {fits[degree]['r2']:.3f} |")
    return lines


def _planner(result: dict[str, Any]) -> list[str]:
    rows, targets = result["rows"], result["targets"]
    lines = [
        f"## Planner, {len(rows)} batches",
        "",
        "Batches under FlexSP's published cost model (A100, 7B, 384K): modelled seconds, no GPU. Medians over seeds;",
        "planning is wall time, in brackets processor time. Speed-ups are modelled time over ours. "
        f"The first plan of a process took {result['cold_plan_s']:.2f} s.",
        "",
        "| GPUs / sequences | lengths | plan p50 | worst p99 | gap inline | gap, background | over static | over greedy | over FlexSP |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for gpus, sequences, name in dict.fromkeys((row["gpus"], row["sequences"], row["distribution"]) for row in rows):
        alike = [row for row in rows if (row["gpus"], row["sequences"], row["distribution"]) == (gpus, sequences, name)]
        plan = f"{_median(alike, 'plan_s_p50') * 1e3:.0f} ms ({_median(alike, 'plan_cpu_s_p50') * 1e3:.0f})"
        worst = f"{max(row['plan_s_p99'] for row in alike) * 1e3:.0f} ms"
        gaps = [f"{_median(alike, key):.1%}" if _values(alike, key) else "" for key in ("gap_inline", "gap_certificate")]
        speedups = [f"{_median(alike, f'speedup_vs_{peer}'):.3f}" if _values(alike, f"speedup_vs_{peer}") else "" for peer in PEERS]
        lines.append(f"| {gpus} / {sequences} | {name} | {plan} | {worst} | {' | '.join(gaps + speedups)} |")
    return [*lines, "", "Aims: " + ", ".join(f"{name} {value:g}" for name, value in targets.items()) + "."]


def _predicted(result: dict[str, Any]) -> list[str]:
    rows, targets = result["rows"], result["targets"]
    lines = [
        "## Predicted and measured memory",
        "",
        f"Peak of one rank in {len(rows)} configurations: the ledger's, and exact live bytes of a real step (gloo ranks on a CPU; what",
        "waits on the host does not count, what comes back does). Terms no count of tensors can show are left out of both.",
        "",
        f"**worst_over {result['worst_over']:.2%}** (aim {targets['over']:.0%} or less), **worst_under {result['worst_under']:.2%}** "
        f"(aim {targets['under']:.0%} or less), mean error {result['mean_error']:.2%}.",
        "",
        "| configuration | ranks | tokens a rank | precision | peak in | predicted MiB | measured MiB | error |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        predicted, measured = row["predicted_bytes"], row["measured_bytes"]
        figures = f"{predicted / MIB:.2f} | {measured / MIB:.2f} | {predicted / measured - 1.0:+.2%}"
        lines.append(f"| {row['name']} | {row['ranks']} | {row['tokens']} | {row['dtype']} | {row['phase']} | {figures} |")
    return lines


def _update(result: dict[str, Any]) -> list[str]:
    millions = result["parameters"] / 1e6
    lines = [
        "## Predicted and measured updates",
        "",
        f"AdamW over {millions:.1f} million float32 weights, {result['ranks']} gloo rank(s): the estimate by measured rates, and",
        "what an update adds to an empty backward pass, in processor seconds (without a GPU nothing overlaps).",
        f"The fastest rates and the least seconds of {result['rounds']} rounds.",
        "",
        f"**worst_error {result['worst_error']:.0%}**",
        "",
        "| states and update | predicted ms | measured ms | predicted / measured |",
        "|---|---|---|---|",
    ]
    for row in result["rows"]:
        lines.append(f"| {row['name']} | {1e3 * row['predicted_s']:.1f} | {1e3 * row['measured_s']:.1f} | {row['ratio']:.2f} |")
    return lines


def _arena(result: dict[str, Any]) -> list[str]:
    headline = ""
    if "worst_ratio" in result:
        headline = (
            f"**worst_ratio {result['worst_ratio']:.4f}** over {len(result['rows'])} of our own traces "
            f"(aim: {result['targets']['worst_ratio']:g} or less), the slowest plan in {result['slowest_plan_s']:.1f} s."
        )
    lines = [
        "## Arena plans",
        "",
        f"Height of the planned arena over the most bytes live at one time (1 is optimal). Traces of full-size models of {result['layers']}"
        " layers from fake tensors, blocks rounded to 512 bytes; what torch's caching allocator would reserve is simulated, not measured.",
        "",
        headline,
        "",
        "| step | allocations | max live GiB | height / max live | planned in s | caching (simulated) | expandable (simulated) |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in [*result["rows"], *result["instances"]]:
        simulated = " | ".join(f"{row['simulated_ratio'][kind]:.3f}" if row in result["rows"] else "" for kind in ("caching", "expandable"))
        figures = f"{row['allocations']} | {row['max_live_bytes'] / (1 << 30):.2f} | {row['ratio']:.4f} | {row['plan_s']:.1f}"
        lines.append(f"| {row['name']} | {figures} | {simulated} |")
    return lines


PEERS = ("static", "greedy", "flexsp")


def _values(rows: list[dict[str, Any]], key: str) -> list[float]:
    return [row[key] for row in rows if row.get(key) is not None]


def _median(rows: list[dict[str, Any]], key: str) -> float:
    return statistics.median(_values(rows, key))


SECTIONS: dict[str, Callable[[dict[str, Any]], list[str]]] = {
    "checkpoint": report_checkpoint.checkpoint,
    "chaos": report_checkpoint.chaos,
    "engines": report_engines.engines,
    "scale": _scale,
    "freed_blocks": _freed_blocks,
    "experts_step": _experts_step,
    "startup": _startup,
    "launch": report_launch.launch,
    "fuzz": report_fuzz.fuzz,
    "step": _step,
    "adaptive": _adaptive,
    "planner": _planner,
    "predicted": _predicted,
    "update": _update,
    "arena": _arena,
    "adapters": report_adapters.adapters,
    "memory": report_memory.memory,
    "gpu_memory": report_memory.gpu_memory,
    "experts": report_experts.experts,
    "experts_throttled": report_experts.experts_throttled,
    "pipeline": report_pipeline.pipeline,
    "published": report_published.published,
}


if __name__ == "__main__":
    raise SystemExit(main())
