"""`python -m efflaunch.bench.first_gpu OUT`: everything that only a GPU can show, on one that is lent for minutes. Not yet run on a GPU.

Each section runs in a process of its own with a time limit, the most likely faults first; one line of JSON each in OUT/first_gpu.jsonl, as
soon as it is done. A section that fails, crashes or takes too long costs no other. `--seconds` is the time all may take together: a section
that would begin with less left than MIN_S is not begun, and one that is under way is ended, so that what there is can be brought home.
A section that is in the file is not run again.

Sections: device (real capacity, context), rope (angles at a million positions, with TF32 allowed), attention (every kind of block
against float64), int32 (rows x heads x dim beyond 2^31), speed (FLOP/s by kernel), order (the same bits each time,
and what that takes), syncs (hidden waits for the device, by policy), packs (1 to 1,024 documents), pinning, offload (overlap with
compute), memory (bench.gpu_memory at 128K and 256K tokens), trainer (four steps in five configurations, ended and resumed in the
middle; needs hydra-core too).

`--device cpu --tiny` runs all of it on CPU kernels in small sizes: what the program does, not what a GPU would.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path

from .gpu_section import Row, Scale
from .record import machine

LIMITS_S = {
    "device": 40.0,
    "rope": 40.0,
    "attention": 90.0,
    "int32": 60.0,
    "speed": 90.0,
    "order": 40.0,
    "syncs": 90.0,
    "packs": 60.0,
    "pinning": 60.0,
    "offload": 60.0,
    "memory": 200.0,
    "trainer": 300.0,
}
"""Seconds a section may take, in the order in which they run."""
MIN_S = 15.0
"""A section that has less time left is not begun: Python and torch alone take about so long to start."""
FILE = "first_gpu.jsonl"


def main(arguments: list[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    if options.here is not None:
        scale = Scale(options.device, options.tiny, options.out, options.seconds)
        print(json.dumps(section(options.here)(scale)))
        return 0
    options.out.mkdir(parents=True, exist_ok=True)
    names = options.sections or list(LIMITS_S)
    rows = run_all(names, options.out / FILE, options.seconds, lambda name, left_s: _apart(options, name, left_s))
    return 1 if any("error" in row for row in rows) else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m efflaunch.bench.first_gpu", description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("out", type=Path, help="directory for results")
    parser.add_argument("sections", nargs="*", metavar="SECTION", help=f"default: all of {', '.join(LIMITS_S)}")
    parser.add_argument("--seconds", type=float, default=540.0, help="what all sections may take together")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--tiny", action="store_true", help="small sizes, for a CPU")
    parser.add_argument("--here", choices=list(LIMITS_S), help=argparse.SUPPRESS)
    return parser


def section(name: str) -> Callable[[Scale], Row]:
    """What a section does; it needs torch."""
    from . import first_gpu_kernels as kernels
    from . import first_gpu_order as ordered
    from . import first_gpu_paths as paths
    from . import first_gpu_runs as runs

    return {
        "device": paths.device,
        "rope": kernels.rope,
        "attention": kernels.attention,
        "int32": kernels.int32,
        "speed": kernels.speed,
        "order": ordered.order,
        "syncs": paths.syncs,
        "packs": kernels.packs,
        "pinning": paths.pinning,
        "offload": paths.offload,
        "memory": runs.memory,
        "trainer": runs.trainer,
    }[name]


def run_all(
    names: Iterable[str],
    file: Path,
    seconds: float,
    run: Callable[[str, float], Row],
    clock: Callable[[], float] = time.monotonic,
) -> list[Row]:
    """Run sections one after the other, each with a row in `file` before the next begins; the rows of these names, old ones too."""
    begun, rows = clock(), read_rows(file)
    names = list(names)
    for name in names:
        if name in {row["section"] for row in rows}:
            continue
        left_s = seconds - (clock() - begun)
        if left_s < MIN_S:
            print(f"{name}: not begun with {max(0.0, left_s):.0f} s left", flush=True)
            continue
        started = clock()
        result = run(name, min(LIMITS_S[name], left_s))
        row = {"section": name, "seconds": round(clock() - started, 1), **result}
        _append(file, row | machine())
        rows.append(row)
        print(f"{name}: {json.dumps({key: value for key, value in row.items() if key != 'section'})}", flush=True)
    return [row for row in rows if row["section"] in names]


def read_rows(file: Path) -> list[Row]:
    """Rows of an earlier call; lines that were cut off do not count, and how many is said."""
    rows: list[Row] = []
    lost = 0
    for line in file.read_text().splitlines() if file.exists() else []:
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            lost += 1
        else:
            rows.append(row)
    if lost:
        print(f"{file}: {lost} line(s) that were cut off are left out", file=sys.stderr, flush=True)
    return rows


def _append(file: Path, row: Row) -> None:
    """Add a line, behind one that was cut off too."""
    with file.open("a+b") as lines:
        lines.seek(0, os.SEEK_END)
        if lines.tell():
            lines.seek(-1, os.SEEK_END)
            if lines.read(1) != b"\n":
                lines.write(b"\n")
        lines.write(json.dumps(row).encode() + b"\n")


def _apart(options: argparse.Namespace, name: str, left_s: float) -> Row:
    """A section's row from a process of its own, which is ended with all it started when its time is over."""
    command = [sys.executable, "-m", "efflaunch.bench.first_gpu", str(options.out), "--here", name, "--device", options.device]
    command += ["--seconds", str(left_s), *["--tiny"] * options.tiny]
    return process_row(command, left_s)


def process_row(command: list[str], left_s: float) -> Row:
    """The JSON that a command prints last, or an `error` with the end of what it said."""
    with tempfile.TemporaryFile("w+") as said, tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(command, stdout=said, stderr=errors, start_new_session=True)
        try:
            code = process.wait(left_s)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            # Its own processes too, which hold the device otherwise.
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        said.seek(0)
        errors.seek(0)
        lines, trouble = said.read().splitlines(), errors.read()[-1500:]
    if code is None:
        return {"error": f"not done after {left_s:.0f} s: {trouble}"}
    if code != 0 or not lines:
        return {"error": f"exit code {code}: {trouble}"}
    row: Row = json.loads(lines[-1])
    return row


if __name__ == "__main__":
    raise SystemExit(main())
