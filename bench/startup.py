"""`python -m efflaunch.bench.startup --json FILE`: how long a person waits for help, for a plan and for the first step.

Real processes, warm cache: everything runs once before it is timed. `first_step_s` runs from typing the quickstart to the
first line of metrics.jsonl that reports a step. Each key is the median of the repeats.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from .record import machine, write_json

COMMAND = (sys.executable, "-m", "efflaunch")
FIRST_STEP_LIMIT_S = 600.0


def main(arguments: list[str] | None = None) -> int:
    options, origin = _parser().parse_args(arguments), machine()
    timed: dict[str, Callable[[], float]] = {
        "help_s": lambda: command_s("--help"),
        "plan_s": lambda: command_s("plan", f"+experiment={options.plan_experiment}"),
    }
    if not options.no_first_step:
        timed["first_step_s"] = lambda: first_step_s(options.overrides)
    repeats = {"help_s": options.repeats, "plan_s": options.repeats, "first_step_s": min(3, options.repeats)}
    seconds = {name: repeated(run, repeats[name]) for name, run in timed.items()}
    result = {
        "benchmark": "startup",
        **origin,
        **{name: statistics.median(times) for name, times in seconds.items()},
        "targets": {"help_s": 0.5, "plan_s": 2.0, "first_step_s": 25.0},
        "seconds": seconds,
    }
    write_json(options.json, result)
    print("  ".join(f"{name} {result[name]:.2f}" for name in seconds) + f"  -> {options.json}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m efflaunch.bench.startup", description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--json", type=Path, required=True, help="where the result goes")
    parser.add_argument("--repeats", type=int, default=5, help="of help and plan; the first step is repeated up to 3 times")
    parser.add_argument("--plan-experiment", default="llama8b_1M")
    parser.add_argument("--no-first-step", action="store_true", help="do not train")
    parser.add_argument("overrides", nargs="*", help="for the quickstart whose first step is timed")
    return parser


def repeated(run: Callable[[], float], repeats: int) -> list[float]:
    """Seconds of each repeat, after one that only warms files and caches."""
    run()
    return [run() for _ in range(repeats)]


def command_s(*arguments: str) -> float:
    """Wall seconds of one command that must succeed."""
    started = time.perf_counter()
    subprocess.run([*COMMAND, *arguments], check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - started


def first_step_s(overrides: list[str]) -> float:
    """Measure seconds from starting the quickstart to its first finished step; the run is then stopped, and awaited."""
    with tempfile.TemporaryDirectory(prefix="efflaunch-bench-") as folder:
        metrics = Path(folder) / "first" / "metrics.jsonl"
        arguments = ["+experiment=quickstart", f"run.root={folder}", "run.id=first", "logging.display=quiet", *overrides]
        log = Path(folder) / "output"
        with log.open("w") as output:
            started = time.perf_counter()
            run = subprocess.Popen([*COMMAND, *arguments], stdout=output, stderr=output, env=os.environ.copy())
            try:
                while not has_step(metrics):
                    if run.poll() is not None:
                        raise RuntimeError(f"the quickstart ended with {run.returncode} before its first step:\n{log.read_text()}")
                    if time.perf_counter() - started > FIRST_STEP_LIMIT_S:
                        raise TimeoutError(f"no step in {FIRST_STEP_LIMIT_S} s:\n{log.read_text()}")
                    time.sleep(0.02)
                return time.perf_counter() - started
            finally:
                _stop(run)


def has_step(metrics: Path) -> bool:
    """Return whether metrics.jsonl holds a whole line that reports a step."""
    if not metrics.exists():
        return False
    lines = metrics.read_text().splitlines(keepends=True)
    return any(json.loads(line)["event"] == "step" for line in lines if line.endswith("\n"))


def _stop(run: subprocess.Popen[bytes]) -> None:
    if run.poll() is None:
        run.send_signal(signal.SIGTERM)
    try:
        run.wait(timeout=120)
    except subprocess.TimeoutExpired:
        run.kill()
        run.wait()


if __name__ == "__main__":
    raise SystemExit(main())
