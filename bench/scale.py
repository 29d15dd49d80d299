"""`python -m efflaunch.bench.scale --json FILE`: what a long run and many kept checkpoints cost those who look, and those who save.

`status_s` is the first look at metrics nobody has read yet, `status_again_s` the next one; both in this process, imports left
out. `save_s` is the median time until a small checkpoint is durable and retention is done, with `kept` of them in the folder.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from ..launcher.rundir.metrics_index import read_summary
from .record import machine, write_json

_SAVES, _WARM_UP = 20, 20


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m efflaunch.bench.scale", description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--json", type=Path, required=True, help="where the result goes")
    parser.add_argument("--steps", type=int, default=50_000)
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 64])
    parser.add_argument("--kept", type=int, nargs="+", default=[2, 200])
    options, origin = parser.parse_args(arguments), machine()
    with tempfile.TemporaryDirectory() as folder:
        looks = [look(Path(folder), options.steps, ranks) for ranks in options.ranks]
        saves = [save(Path(folder) / f"kept-{kept}", kept) for kept in options.kept]
    result = {"benchmark": "scale", **origin, "steps": options.steps, "looks": looks, "saves": saves}
    write_json(options.json, result)
    for row in looks:
        first, again = f"{row['status_s']:.2f} s ({row['bytes_read']:,} bytes)", f"{row['status_again_s']:.2f} s ({row['bytes_again']:,})"
        print(f"{options.steps:,} steps of {row['ranks']} ranks: {first}, then {again}, {row['peak_bytes'] >> 20} MiB at most")
    for row in saves:
        print(f"{row['kept']} kept: {1000 * row['save_s']:.1f} ms a save, {row['inspected']:g} checkpoints looked at")
    return 0


def look(folder: Path, steps: int, ranks: int) -> dict[str, Any]:
    """Seconds and bytes of two looks at metrics of this size."""
    run_dir = folder / f"ranks-{ranks}"
    run_dir.mkdir()
    with (run_dir / "metrics.jsonl").open("w") as file:
        file.write(json.dumps({"event": "start", "step": 0, "steps": steps, "world_size": ranks, "parameters": 1}) + "\n")
        for step in range(1, steps + 1):
            file.write(json.dumps(_step(step, ranks)) + "\n")
    row: dict[str, Any] = {"ranks": ranks, "file_bytes": (run_dir / "metrics.jsonl").stat().st_size}
    for seconds, read in (("status_s", "bytes_read"), ("status_again_s", "bytes_again")):
        started = time.perf_counter()
        summary = read_summary(run_dir)
        assert summary.progress().step == steps
        row |= {seconds: time.perf_counter() - started, read: summary.bytes_read}
    return row | {"peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}


def _step(step: int, ranks: int) -> dict[str, Any]:
    rows = [{"rank": rank, "tokens": 8192, "peak_bytes": 70 << 30, "own_s": 1.2345678} for rank in range(ranks)]
    numbers = {"loss": 2.345678, "tokens": 8192 * ranks, "step_s": 1.5, "tokens_per_s": 1e5, "plan": "[0+2: 3 seq]", "lr": 1e-4}
    return {"event": "step", "time": 1.7e9 + step, "step": step, **numbers, "grad_norm": 0.5, "ranks": rows, "total_tokens": 8192 * step}


def save(folder: Path, kept: int) -> dict[str, Any]:
    """Seconds of a save where so many checkpoints stay, and how many are looked at for it."""
    from .chaos import State

    state = State()
    engine = state.engine(folder, keep_last=kept)
    seconds, inspected, first = [], 0, max(kept, _WARM_UP)
    for step in range(1, first + _SAVES + 1):
        state.set(step)
        started = time.perf_counter()
        engine.save(step, {})
        engine.wait()
        seconds.append(time.perf_counter() - started)
        if step == first:
            inspected = engine._committer._catalog.num_inspected
    inspected = engine._committer._catalog.num_inspected - inspected
    engine.close()
    return {"kept": kept, "save_s": statistics.median(seconds[-_SAVES:]), "inspected": inspected / _SAVES}


if __name__ == "__main__":
    sys.exit(main())
