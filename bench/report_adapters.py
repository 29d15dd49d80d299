"""The page's section on adapters: bytes a token and step times against peft."""

from __future__ import annotations

from typing import Any

NAMES = {
    "peft_checkpointing": "peft, gradient checkpointing",
    "lora_auto": "LoRA, auto where everything is full",
    "lora_auto_with_room": "LoRA, auto where it has room",
    "qlora_auto": "QLoRA, auto where everything is full",
    "full_auto": "all weights, auto where everything is full",
    "full_auto_with_room": "all weights, auto where it has room",
}


def adapters(result: dict[str, Any]) -> list[str]:
    """Lines of the section for one result of bench/adapters.py."""
    settings, longest = result["settings"], max(result["settings"]["lengths"])
    lines = [
        "## Adapters",
        "",
        f"One process, no GPU, float32, {settings['layers']} layers of Llama-8B's ratios ({settings['shape']} heads x head dim), rank "
        f"{result['rank']} on every matrix; peak live bytes of a warm step, slopes over {settings['lengths']} tokens; times of "
        f"{settings['time_tokens']} tokens, medians of {settings['rounds']} interleaved rounds. Factors' gradients equal peft's "
        f"within {result['gradient_error']:.1e}.",
        "",
        f"| training | bytes a token | of peft | peak at {longest}, MiB | on the host, MiB | time of peft's | processor time of peft's |",
        "|---|---|---|---|---|---|---|",
    ]
    base = result["rows"]["peft_checkpointing"]["bytes_per_token"]
    for name, row in result["rows"].items():
        device, host = (row[key][-1] / (1 << 20) for key in ("device_bytes", "host_bytes"))
        slope, wall, processor = row["bytes_per_token"], result["time_ratio"][name], result["processor_ratio"][name]
        lines.append(
            f"| {NAMES[name]} | {slope:,.0f} | {slope / base:.2f} | {device:.1f} | {host:.1f} | {wall:.2f} x | {processor:.2f} x |"
        )
    return lines
