"""The page's sections on memory: bytes and time of every scheme, and the executor on a GPU."""

from __future__ import annotations

from typing import Any

KIB = 1024
GIB = 1 << 30
NAMES = {
    "plain": "Hugging Face, nothing recomputed",
    "hf_checkpointing": "Hugging Face gradient checkpointing",
    "hf_checkpointing_offload": "the same, inputs on the host",
    "deepspeed_alst": "DeepSpeed ALST",
    "deepspeed_alst_as_shipped": "the same as shipped",
    "streambp_released": "StreamBP as released",
    "auto_with_room": "auto where it has room",
}


def memory(result: dict[str, Any]) -> list[str]:
    lines = ["## Memory schemes", ""]
    if "bytes_per_token" in result:
        lines += _bytes(result)
    if "time_ratio" in result:
        lines += ["", *_time(result)]
    return lines + ["", *_notes(result)]


def _bytes(result: dict[str, Any]) -> list[str]:
    settings, summary, targets = result["settings"], result["summary"], result["targets"]
    figures = [
        f"**{label} {summary[key]:.2f}** (aim {aim} {targets[key]:g})"
        for key, label, aim in (
            ("auto_kib", "auto, KiB a token on the device", "at most"),
            ("alst_over_auto", "ALST over auto", "at least"),
            ("streambp_over_released", "our streambp over the released one", "at most"),
        )
        if key in summary
    ]
    lines = [
        "Peak live bytes per token of one bfloat16 forward and backward, at Llama-3-8B's width and 32 layers: exact storages, one process,",
        f"no GPU; layers of Llama-8B's ratios in widths {', '.join(settings['shapes'])} (heads x head dim), {_counts(result)} layers and",
        f"{', '.join(map(str, settings['lengths']))} tokens, slopes by least squares, so that weights and chunks drop out. The longest",
        "sequences are derived from the slopes and 24.5 GiB of fixed bytes (bench/slopes.py), for one 80 GiB device.",
        "",
        "; ".join(figures) + ".",
        "",
        f"| scheme | KiB a token, device | of it a layer | host | {' | '.join(_budgets(result))} |",
        "|---|---|---|---|---|---|",
    ]
    for name, row in result["details"].items():
        device, host = row["device"], row["host"]
        longest = " | ".join(f"{_tokens(budget['tokens'])} ({budget['binds']})" for budget in result["max_tokens_derived"][name].values())
        lines.append(f"| {_name(name)} | {device['kib']:.1f} | {device['per_layer'] / KIB:.1f} | {host['kib']:.1f} | {longest} |")
    best = result["max_tokens_derived_auto"] or {}
    phrases = [f"{_tokens(row['tokens'])} with {name} ({row['segment_layers']} layers to a stored input)" for name, row in best.items()]
    return lines + (
        ["", f"With the number of layers that share a stored input chosen for each budget, auto reaches {', '.join(phrases)}."]
        if phrases
        else []
    )


def _counts(result: dict[str, Any]) -> str:
    return ", ".join(map(str, sorted({row["layers"] for detail in result["details"].values() for row in detail["measured"]})))


def _budgets(result: dict[str, Any]) -> list[str]:
    return [f"longest, {name}" for name in next(iter(result["max_tokens_derived"].values()))]


def _tokens(count: int) -> str:
    return f"{count / 1e6:.2f}M" if count >= 1e6 else f"{count / 1e3:.0f}K"


def _name(name: str) -> str:
    return NAMES.get(name, f"ours: {name}")


def _time(result: dict[str, Any]) -> list[str]:
    task = result["time_task"]
    shape = task["shape"]
    lines = [
        f"Seconds of a step over Hugging Face gradient checkpointing's, float32, one thread, {task['num_tokens']} tokens,",
        f"{task['num_layers']} layers of {shape['num_heads']} x {shape['head_dim']}, chunks of {task['chunks']['layer']}: the median over",
        f"{len(next(iter(result['seconds'].values())))} interleaved rounds.",
        "",
        "| scheme | time | processor time |",
        "|---|---|---|",
    ]
    for name, ratio in result["time_ratio"].items():
        lines.append(f"| {_name(name)} | {ratio:.3f} | {result['processor_ratio'][name]:.3f} |")
    return lines


def _notes(result: dict[str, Any]) -> list[str]:
    details = result.get("details", {})
    lines = [f"- {_name(name)}: {row['notes']}." for name, row in details.items() if row["notes"]]
    mask = result.get("forward_mask")
    if mask is not None:
        lines.append(
            f"- StreamBP as released holds {mask['bytes_per_token_squared']:.1f} bytes x tokens^2 more in forward, its dense mask; its "
            "slope above is without it."
        )
    lines.append("- no GPU was used; `python -m efflaunch.bench.gpu_memory --json FILE` measures the executor on one (not yet run)")
    lines.append("- `python -m efflaunch.bench.first_gpu OUT` does all that only a GPU can show, within `--seconds` (not yet run on a GPU)")
    if details:
        worst = max(row["gradient_error"] for row in details.values())
        lines.append(f"- gradients against plain Hugging Face, float32: off by {worst:.1e} at most")
        auto = details.get("auto", {}).get("policy")
        if auto is not None:
            lines.append(
                f"- auto is what the solver gives for Llama-3-8B and {result['auto_tokens'] / 1e6:.1f}M tokens on eight 80 GB GPUs: "
                f"inputs of every {auto['segment_layers']} layers, {auto['layer_input'][1]:.0%} of them on the host; attention by "
                f"{auto['attention']}"
            )
    return lines


def gpu_memory(result: dict[str, Any]) -> list[str]:
    rows, summary = result["rows"], result["summary"]
    done = next((row for row in rows if "device_name" in row), None)
    lines = ["## The memory executor on a GPU", ""]
    if done is not None:
        lines.append(f"{done['device_name']}, attention by {done['kernel']}; forward and backward, no optimizer.")
    for kind, what in (("attention", "attention"), ("sinks", "attention with sinks"), ("executor", "executor")):
        if kind in summary:
            lines.append(f"Errors of {what} in bfloat16 against float32 are at most {summary[kind]:.2f} times those of stock bfloat16.")
    lines += ["", "| tokens | layers | seconds | peak GiB | reserved GiB | MFU, causal | 32 layers: seconds | peak GiB | host GiB |"]
    lines += ["|---|---|---|---|---|---|---|---|---|"]
    for row in summary["lengths"]:
        cells = [row["tokens"], row["layers"], _figure(row["seconds"]), _gib(row["peak_bytes"]), _gib(row["reserved_bytes"])]
        cells += ["" if row["mfu"] is None else f"{row['mfu']:.1%}", _figure(row.get("seconds_32_layers"))]
        cells += [_gib(row.get("peak_bytes_32_layers")), _gib(row.get("host_bytes_32_layers"))]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    for key, text in (
        ("offload_over_kept_s", "Seconds with layer inputs on the host over seconds with them kept"),
        ("reserved_default_over_expandable", "Bytes reserved by the default allocator over those with expandable segments"),
    ):
        if key in summary:
            lines += ["", f"{text}: {summary[key]:.3f}."]
    return [*lines, *(f"- failed: {row['job']}: {row['error']}" for row in rows if "error" in row)]


def _figure(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}"


def _gib(value: float | None) -> str:
    return "" if value is None else f"{value / GIB:.1f}"
