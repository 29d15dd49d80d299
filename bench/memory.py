"""`python -m efflaunch.bench.memory --json FILE`: bytes per token and step time of every memory scheme, ours and the peers'.

Bytes: one bfloat16 training step (forward and backward, weights' gradients in buffers that are there before) under the exact
storage tracer, what a scheme moves to the host not counted as device memory, at several lengths, widths with Llama-8B's ratios,
and two layer counts. Slopes by least squares; weights and chunks drop out. `bytes_per_token` is brought to Llama-8B's width and
32 layers (bench/slopes.py); `details.NAME.measured` has every slope as measured. Kernels' scratch memory is not seen.

Time: float32, one thread, the same process, rounds interleaved: `time_ratio` is the median over rounds of a scheme's step time over
Hugging Face gradient checkpointing's in the same round, `processor_ratio` the same in processor seconds.

Every contestant first makes the gradients of plain Hugging Face (`gradient_error`), or the benchmark stops.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from .peers.shape import Chunks, Shape, Task
from .record import machine, write_json
from .slopes import LONGEST, at_llama_8b, fit_line, max_tokens, max_tokens_by_segments

TARGETS = {"auto_kib": 32.0, "alst_over_auto": 3.0, "streambp_over_released": 1.0, "time_streambp": 1.0, "time_auto": 1.0}


def main(arguments: list[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    result: dict[str, Any] = {"benchmark": "memory", **machine(), "targets": TARGETS, "settings": _settings(options)}
    auto = _auto(options)
    for wanted, measure in ((options.lengths, measured_bytes), (options.rounds, measured_time)):
        if wanted:
            result |= measure(options, auto)
            write_json(options.json, result | {"summary": summary(result)})
    print("\n".join(f"{key} {value:.4g}" for key, value in summary(result).items()) + f"\n-> {options.json}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m efflaunch.bench.memory", description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--json", type=Path, required=True, help="where the result goes")
    parser.add_argument("--only", nargs="*", help="these contestants (hf_checkpointing is always timed)")
    parser.add_argument("--shapes", nargs="*", default=["4x8", "4x16", "8x8", "8x6"], metavar="HEADSxDIM")
    parser.add_argument("--layers", type=int, nargs=2, default=[4, 8], help="bytes are measured with both")
    parser.add_argument("--lengths", type=int, nargs="*", default=[2000, 2500, 3000], help="none: no bytes are measured")
    parser.add_argument("--chunk", type=int, default=250, help="tokens of a chunk, ours and StreamBP's, for bytes")
    parser.add_argument("--rounds", type=int, default=7, help="0: no time is measured")
    parser.add_argument("--time-shape", default="8x32", metavar="HEADSxDIM")
    parser.add_argument("--time-layers", type=int, default=4)
    parser.add_argument("--time-tokens", type=int, default=4096)
    parser.add_argument("--time-chunk", type=int, default=1024, help="tokens of a chunk, ours and StreamBP's")
    parser.add_argument("--compile", action="store_true", help="our presets are timed with memory.compile=true as well: NAME+compile")
    return parser


def _settings(options: argparse.Namespace) -> dict[str, Any]:
    return {key: value for key, value in vars(options).items() if key != "json"}


def _shape(text: str) -> Shape:
    heads, dim = text.split("x")
    return Shape(int(heads), int(dim))


def measured_bytes(options: argparse.Namespace, auto: Mapping[str, Any]) -> dict[str, Any]:
    """Measure everything about bytes; prints a line per contestant."""
    from .contest import contestants, describe

    details = {}
    for name, entry in contestants(options.chunk, auto).items():
        if not options.only or name in options.only:
            row = details[name] = _bytes_of(name, entry, options)
            row["policy"] = None if entry.policy is None else describe(entry.policy)
            print(f"{name:28s} {row['device']['kib']:9.2f} KiB/token  host {row['host']['kib']:8.2f}", flush=True)
    return {
        "bytes_per_token": {name: row["device"]["total"] for name, row in details.items()},
        "host_bytes_per_token": {name: row["host"]["total"] for name, row in details.items()},
        "max_tokens_derived": {name: max_tokens(row["device"]["total"], row["host"]["total"]) for name, row in details.items()},
        "max_tokens_derived_auto": max_tokens_by_segments(details["auto"]["device"]["total"]) if "auto" in details else None,
        "auto_tokens": LONGEST,
        "forward_mask": _forward_mask(options),
        "details": details,
    }


def _bytes_of(name: str, entry: Any, options: argparse.Namespace) -> dict[str, Any]:
    from .contest import CHECK, GRADIENT_TOLERANCE, gradient_error

    error = gradient_error(entry.build)
    if not error < GRADIENT_TOLERANCE:
        raise RuntimeError(f"{name} does not compute plain Hugging Face's gradients: off by {error:.2e}")
    k = entry.segment_layers
    counts = options.layers if all(layers % k == 0 for layers in options.layers) else [2 * k, 4 * k]
    tasks = [Task(_shape(shape), layers, 0, _chunks(options)) for layers in counts for shape in options.shapes]
    rows = [_slope(entry.build, task, options.lengths) for task in tasks]
    device, host = (
        at_llama_8b({layers: {_shape(r["shape"]): r[key] for r in rows if r["layers"] == layers} for layers in counts})
        for key in ("device_slope", "host_slope")
    )
    notes = entry.build(CHECK).notes()
    return {"gradient_error": error, "notes": notes, "device": device.row(), "host": host.row(), "measured": rows}


def _chunks(options: argparse.Namespace) -> Chunks:
    # Small chunks of the loss: its fixed bytes must not hide the slope of the layers, which is the larger one at any real length.
    return Chunks(layer=options.chunk, loss=10, streambp_layer=options.chunk, streambp_loss=10)


def _slope(build: Any, task: Task, lengths: list[int]) -> dict[str, Any]:
    from .contest import peak

    peaks = [peak(build(replace(task, num_tokens=length))) for length in lengths]
    device = fit_line([(length, p.device_bytes) for length, p in zip(lengths, peaks, strict=True)])
    host = fit_line([(length, p.host_bytes) for length, p in zip(lengths, peaks, strict=True)])
    return {
        "shape": f"{task.shape.num_heads}x{task.shape.head_dim}",
        "layers": task.num_layers,
        "lengths": lengths,
        "device_bytes": [p.device_bytes for p in peaks],
        "host_bytes": [p.host_bytes for p in peaks],
        "device_slope": device.slope,
        "device_residual": device.residual,
        "host_slope": host.slope,
        "at_peak": peaks[-1].at_peak,
    }


def _forward_mask(options: argparse.Namespace) -> dict[str, Any] | None:
    """Measure what released StreamBP's dense mask adds as shipped, in bytes per token squared: the second difference of peaks."""
    from .contest import peak
    from .peers.streambp import ReleasedStreamBP

    first, second, third = (*options.lengths, None, None, None)[:3]
    if (options.only and "streambp_released" not in options.only) or third is None or third - second != second - first:
        return None
    task = Task(_shape(options.shapes[0]), options.layers[0], 0, _chunks(options))
    a, b, c = (peak(ReleasedStreamBP(replace(task, num_tokens=n), as_shipped=True)).device_bytes for n in (first, second, third))
    return {"bytes_per_token_squared": (c - 2 * b + a) / (2 * (second - first) ** 2), "lengths": options.lengths, "device_bytes": [a, b, c]}


def measured_time(options: argparse.Namespace, auto: Mapping[str, Any]) -> dict[str, Any]:
    """Interleaved rounds of all contestants."""
    from .contest import BASE, COMPILED, contestants, ratios, timed_rounds

    task, chunk = _time_task(options), options.time_chunk
    entries = contestants(chunk, auto, compiled=options.compile)
    wanted = {*(options.only or entries), BASE}
    entered = {name: entry.build(task) for name, entry in entries.items() if name.removesuffix(COMPILED) in wanted}
    taken = timed_rounds(entered, options.rounds)
    wall, processor = ratios(taken["seconds"]), ratios(taken["processor_s"])
    for name, ratio in wall.items():
        print(f"{name:28s} {ratio:6.3f} x {BASE}  ({processor[name]:.3f} in processor time)", flush=True)
    return {"time_ratio": wall, "processor_ratio": processor, **taken, "time_task": asdict(task)}


def _time_task(options: argparse.Namespace) -> Task:
    chunk = options.time_chunk
    chunks = Chunks(layer=chunk, loss=min(chunk, 512), streambp_layer=chunk, streambp_loss=min(chunk, 512))
    return Task(_shape(options.time_shape), options.time_layers, options.time_tokens, chunks, dtype="float32")


def _auto(options: argparse.Namespace) -> dict[str, Any]:
    """Policies of memory=auto, where any is wanted."""
    import torch

    from .peers.ours import auto_policies

    torch.set_num_threads(1)
    wanted = not options.only or any(name.startswith("auto") for name in options.only)
    return auto_policies(_time_task(options)) if wanted else {}


def summary(result: dict[str, Any]) -> dict[str, float]:
    """The figures that have targets, as far as they were measured."""
    device, wall = result.get("bytes_per_token", {}), result.get("time_ratio", {})
    figures = {}
    if "auto" in device:
        figures["auto_kib"] = device["auto"] / 1024
        if "deepspeed_alst" in device:
            figures["alst_over_auto"] = device["deepspeed_alst"] / device["auto"]
    if {"streambp", "streambp_released"} <= set(device):
        figures["streambp_over_released"] = device["streambp"] / device["streambp_released"]
    for key, name in (("time_streambp", "streambp"), ("time_auto", "auto_with_room")):
        if name in wall:
            figures[key] = wall[name]
    return figures


if __name__ == "__main__":
    raise SystemExit(main())
