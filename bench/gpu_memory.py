"""`python -m efflaunch.bench.gpu_memory --json FILE`: the memory executor on a GPU, from its correctness to 2^20 tokens.

Needs torch 2.11 or newer and transformers, and nothing else of the project's dependencies. Each job runs in a process of its
own, so that one that fails or takes too long costs no other; after each the file is written, and a job that is in the file is
not run again: start it again to resume. `--seconds` is the time it may take; a job that is expected to take longer than what is
left is not started.

Jobs, in order: in bfloat16 against float32, attention blocks (SDPA), those with sinks (one softmax) and the executor (Hugging Face);
then for each length one layer of Llama-3-8B's shape, and as many layers as time and memories allow; at the first length also with layer
inputs kept on the device (what offload costs) and with the default allocator (`expandable_segments` is on otherwise). A step is forward
and backward; no optimizer. Figures for 32 layers are on the line through the two layer counts. MFU counts causal attention and no
recomputation.

Not yet run on a GPU.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .peers.shape import LLAMA_8B_LAYERS, Shape
from .record import machine, write_json
from .slopes import fit_line

Job = dict[str, Any]
Rows = list[dict[str, Any]]
PEAK_FLOPS = {"H100": 989e12, "H200": 989e12, "B200": 2250e12, "A100": 312e12}
"""Dense bfloat16, by data sheet."""
START_S = 45.0
"""Seconds a process takes until its step begins (assumed), weights of many layers included."""
LAYER_COUNTS = (32, 24, 16, 8, 4, 2)


def main(arguments: list[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    if options.job is not None:
        return _run_here(json.loads(options.job))
    if options.json is None:
        _parser().error("--json FILE is needed")
    rows: Rows = json.loads(options.json.read_text())["rows"] if options.json.exists() else []
    origin, deadline = machine(), time.monotonic() + options.seconds
    while (job := next_job(options, rows, deadline - time.monotonic())) is not None:
        rows.append({"job": job, **_run_apart(job, deadline - time.monotonic())})
        write_json(options.json, {"benchmark": "gpu_memory", **origin, "rows": rows, "summary": summary(rows, options.peak_flops)})
        print(_line(rows[-1]), flush=True)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m efflaunch.bench.gpu_memory", description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--json", type=Path, help="where results go; what is there already is not run again")
    parser.add_argument("--seconds", type=float, default=540.0, help="how long it may take")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--tokens", type=int, nargs="+", default=[1 << 17, 1 << 18, 1 << 19, 1 << 20])
    parser.add_argument("--shape", type=int, nargs=2, default=[32, 128], metavar=("HEADS", "DIM"))
    parser.add_argument("--check-shape", type=int, nargs=2, default=[8, 128], metavar=("HEADS", "DIM"))
    parser.add_argument("--check-tokens", type=int, default=3000)
    parser.add_argument("--chunk", type=int, default=16384, help="tokens of a chunk of the layers")
    parser.add_argument("--check-chunk", type=int, default=700)
    parser.add_argument("--loss-chunk", type=int, default=2048)
    parser.add_argument("--segment-layers", type=int, default=1, help="layers that share one stored input")
    parser.add_argument("--most-layers", type=int, default=LLAMA_8B_LAYERS)
    parser.add_argument("--host-gib", type=float, help="host memory for layer inputs; default: three quarters of what is free")
    parser.add_argument("--peak-flops", type=float, help="of the device in bfloat16; default: by its name")
    parser.add_argument("--job", help=argparse.SUPPRESS)
    return parser


def next_job(options: argparse.Namespace, rows: Rows, left_s: float) -> Job | None:
    """The first wanted job that has no row and can be expected to end in time. Pure but for the host's free memory."""
    for job, expected_s in wanted(options, rows):
        if all(row["job"] != job for row in rows) and expected_s < left_s:
            return job
    return None


def wanted(options: argparse.Namespace, rows: Rows) -> Iterator[tuple[Job, float]]:
    """All jobs in order, with the seconds each may take by what `rows` have shown; those that nothing is known about come later."""
    base = {"device": options.device, "allocator": "expandable"}
    check = base | {"shape": options.check_shape, "tokens": options.check_tokens}
    yield check | {"kind": "attention"}, START_S
    yield check | {"kind": "sinks"}, START_S
    yield check | {"kind": "executor", "layers": 3, "chunk": options.check_chunk, "loss_chunk": options.check_chunk}, 2 * START_S
    for index, num_tokens in enumerate(options.tokens):
        one = base | _step_job(options, num_tokens, 1)
        yield one, START_S + _guess_s(rows, num_tokens, 1)
        done = _row(rows, one)
        if done is None or "error" in done:
            continue
        many = one | {"layers": _most_layers(options, done)}
        if many["layers"] > 1:
            yield many, START_S + _guess_s(rows, num_tokens, many["layers"])
        if index == 0:
            yield many | {"keep_inputs": True}, START_S + _guess_s(rows, num_tokens, many["layers"])
            yield many | {"allocator": "default"}, START_S + _guess_s(rows, num_tokens, many["layers"])


def _step_job(options: argparse.Namespace, num_tokens: int, layers: int) -> Job:
    chunks = {"chunk": options.chunk, "loss_chunk": options.loss_chunk, "segment_layers": options.segment_layers}
    return {
        "kind": "step",
        "shape": options.shape,
        "tokens": num_tokens,
        "layers": layers,
        "policy": "auto",
        "keep_inputs": False,
        **chunks,
    }


def _row(rows: Rows, job: Job) -> dict[str, Any] | None:
    return next((row for row in rows if row["job"] == job), None)


def _guess_s(rows: Rows, num_tokens: int, layers: int) -> float:
    """Seconds of a step from the nearest measured one: at most as tokens squared and as layers."""
    timed = [row for row in rows if row["job"]["kind"] == "step" and "seconds" in row]
    if not timed:
        return START_S
    nearest = min(timed, key=lambda row: (abs(row["job"]["tokens"] - num_tokens), abs(row["job"]["layers"] - layers)))
    times = num_tokens / nearest["job"]["tokens"]
    return float(nearest["seconds"]) * max(times, times**2) * layers / nearest["job"]["layers"]


def _most_layers(options: argparse.Namespace, one: dict[str, Any]) -> int:
    """Return how many layers fit device, host and about half of the whole time; 1 where not even two do."""
    shape, num_tokens = Shape(*options.shape), one["job"]["tokens"]
    weights = 2 * layer_parameters(shape) * 2  # and their gradients
    inputs = 2 * shape.hidden_size * num_tokens
    for layers in LAYER_COUNTS:
        fits = one["device_bytes"] is None or one["peak_bytes"] + (layers - 1) * weights < 0.93 * one["device_bytes"]
        segments = -(-layers // options.segment_layers) + options.segment_layers - 1
        in_time = one["seconds"] * layers < 0.5 * options.seconds
        if layers <= options.most_layers and fits and in_time and segments * inputs < _host_bytes(options):
            return layers
    return 1


def _host_bytes(options: argparse.Namespace) -> float:
    if options.host_gib is not None:
        return float(options.host_gib) * (1 << 30)
    from ..memory.offload.checks import free_memory

    return 0.75 * free_memory().num_bytes


def _run_apart(job: Job, left_s: float) -> dict[str, Any]:
    """The job's result from a new process, or `error`."""
    settings = f"expandable_segments:{job['allocator'] == 'expandable'}"
    environment = os.environ | {"PYTORCH_ALLOC_CONF": settings, "PYTORCH_CUDA_ALLOC_CONF": settings}
    command = [sys.executable, "-m", "efflaunch.bench.gpu_memory", "--job", json.dumps(job)]
    started = time.monotonic()
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=max(1.0, left_s), env=environment)
    except subprocess.TimeoutExpired:
        return {"error": f"not done after {left_s:.0f} s"}
    taken = {"process_s": time.monotonic() - started}
    if done.returncode:
        return taken | {"error": done.stderr.strip().splitlines()[-1] if done.stderr.strip() else f"exit code {done.returncode}"}
    return taken | json.loads(done.stdout.splitlines()[-1])


def _run_here(job: Job) -> int:
    if job["kind"] not in ("attention", "sinks", "executor", "step"):
        raise ValueError(f"no such job: {job['kind']}")
    from .gpu_jobs import run_job

    print(json.dumps(run_job(job)))
    return 0


def layer_parameters(shape: Shape) -> int:
    """Count the parameters of one decoder layer's matrices."""
    width, kv = shape.hidden_size, shape.hidden_size // 4
    return width * (2 * width + 2 * kv) + 3 * width * (width * 7 // 2)


def model_flops(shape: Shape, num_tokens: int, layers: int) -> float:
    """Count the FLOPs of forward and backward with causal attention and nothing recomputed."""
    linear = 6.0 * (layers * layer_parameters(shape) + shape.vocab_size * shape.hidden_size) * num_tokens
    return linear + layers * 7.0 / 2.0 * 2 * num_tokens**2 * shape.hidden_size


def summary(rows: Rows, peak_flops: float | None = None) -> dict[str, Any]:
    """Summarize the rows: correctness, one entry per length, and the effect of offload and of the allocator."""
    steps = [row for row in rows if row["job"]["kind"] == "step" and "seconds" in row]
    plain = [row for row in steps if not row["job"]["keep_inputs"] and row["job"]["allocator"] == "expandable"]
    lengths = sorted({row["job"]["tokens"] for row in plain})
    figures: dict[str, Any] = {row["job"]["kind"]: row["worst_ratio"] for row in rows if "worst_ratio" in row}
    figures["lengths"] = [_length([row for row in plain if row["job"]["tokens"] == tokens], peak_flops) for tokens in lengths]
    for row in steps:
        like = _row(plain, row["job"] | {"keep_inputs": False, "allocator": "expandable"})
        if like is not None and row["job"]["keep_inputs"]:
            figures["offload_over_kept_s"] = like["seconds"] / row["seconds"]
        if like is not None and row["job"]["allocator"] == "default" and row["reserved_bytes"]:
            figures["reserved_default_over_expandable"] = row["reserved_bytes"] / like["reserved_bytes"]
    return figures


def _length(rows: Rows, peak_flops: float | None) -> dict[str, Any]:
    """Summarize one length: the most layers measured, and 32 layers on the line through all layer counts."""
    most = max(rows, key=lambda row: row["job"]["layers"])
    shape, tokens, layers = Shape(*most["job"]["shape"]), most["job"]["tokens"], most["job"]["layers"]
    entry = {"tokens": tokens, "layers": layers, **{key: most[key] for key in ("seconds", "peak_bytes", "reserved_bytes", "host_bytes")}}
    flops = peak_flops or next((value for name, value in PEAK_FLOPS.items() if name in most["device_name"]), None)
    entry["mfu"] = model_flops(shape, tokens, layers) / most["seconds"] / flops if flops else None
    if len({row["job"]["layers"] for row in rows}) > 1:
        for key in ("seconds", "peak_bytes", "host_bytes"):
            line = fit_line([(row["job"]["layers"], row[key]) for row in rows])
            entry[f"{key}_32_layers"] = line.offset + LLAMA_8B_LAYERS * line.slope
    return entry


def _line(row: dict[str, Any]) -> str:
    job = row["job"]
    what = " ".join(str(job[key]) for key in ("kind", "tokens", "layers", "policy", "keep_inputs", "allocator") if key in job)
    if "error" in row:
        return f"{what}: {row['error']}"
    if "worst_ratio" in row:
        return f"{what}: error at most {row['worst_ratio']:.2f} x that of stock bfloat16"
    return f"{what}: {row['seconds']:.2f} s, {row['peak_bytes'] / (1 << 30):.2f} GiB"


if __name__ == "__main__":
    raise SystemExit(main())
