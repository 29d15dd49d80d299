"""The page's section on engines: our step under each, and each driven plainly."""

from __future__ import annotations

from typing import Any

NAMES = {
    "ours_torch": "ours, `engine=torch`",
    "plain_fsdp": "FSDP2, plain loop",
    "ours_deepspeed": "ours, `engine=deepspeed engine.stage=3`",
    "plain_deepspeed": "DeepSpeed ZeRO-3, plain loop",
}


def engines(result: dict[str, Any]) -> list[str]:
    """Lines of the section for one result of bench/engines.py."""
    speeds, peaks, starts = result["tokens_per_s"], result["peak_bytes"], result["startup_s"]
    rows = [f"| {shown} | {speeds[name]:,.0f} | {peaks[name] / (1 << 20):.1f} | {starts[name]:.1f} |" for name, shown in NAMES.items()]
    return [
        "## Engines",
        "",
        f"Same model, weights and packed tokens (documents of {', '.join(map(str, result['lengths']))} tokens on each of {result['ranks']}",
        "gloo ranks), float32, recompute against gradient checkpointing, attention document by document in all, "
        f"{result['rounds']} interleaved rounds.",
        "",
        f"**vs_plain_deepspeed {result['vs_plain_deepspeed']:.3f}** and **vs_plain_fsdp {result['vs_plain_fsdp']:.3f}** (our tokens/s "
        "over the same engine's driven plainly, aim 1.0 or more), "
        f"**peak_vs_plain_deepspeed {result['peak_vs_plain_deepspeed']:.3f}** and "
        f"peak_vs_plain_fsdp {result['peak_vs_plain_fsdp']:.3f} (aim 0.8 or less).",
        "",
        "| | tokens/s (median) | peak MiB of rank 0 | start-up, s |",
        "|---|---|---|---|",
        *rows,
    ]
