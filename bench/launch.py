"""`python -m efflaunch.bench.launch --json FILE`: what a launcher costs: to the first step, after a death, to the end.

One life of every contestant in each round, in turn: a command is typed and its first training step awaited; a rank is
killed (SIGKILL) and the next step awaited; where there are several nodes one of them loses power and the next step is
awaited; a stop signal is sent (on a cluster `efflaunch cancel` is typed) and the end awaited. Bare torch elastic runs as
many ranks with the same imports and a plain model of the same sizes, without checkpoints: what a launcher takes beyond it is
its own. Clusters are of this machine (bench/clusters), up before the command is typed; what cannot be measured here is
listed with the reason.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from .launch_places import CONTESTANTS, Contestant, Place
from .record import machine, write_json

LIMIT_S = 600.0
"""Longest wait for any one event, in seconds."""
BASE = "elastic"
METRICS = ("start_s", "rank_death_s", "node_death_s", "stop_s")
OVERRIDES = (
    "model=tiny",
    "data=indexed",
    "data.max_seq_len=512",
    "data.global_batch_tokens=2K",
    "cluster=local_cpu",
    "parallel.tokens_per_rank=512",
    "train.dtype=float32",
    "optim.schedule=constant",
    "optim.lr=1e-3",
    "checkpoint.every_steps=2",
)
_STEPS_BETWEEN = 3
"""Awaited after each start, so that there is a checkpoint to resume from."""


def main(arguments: list[str] | None = None) -> int:
    options, origin = _parser().parse_args(arguments), machine()
    chosen = {name: CONTESTANTS[name] for name in options.contestants.split(",")}
    skipped = {name: reason for name, entry in chosen.items() if (reason := entry.why_not()) is not None}
    entered = {name: entry for name, entry in chosen.items() if name not in skipped}
    with tempfile.TemporaryDirectory(prefix="efflaunch-bench-", dir=options.folder) as folder:
        place = Path(folder)
        overrides = [*OVERRIDES, f"data.prefixes=[{make_corpus(place / 'corpus')}]", *options.overrides]
        lives, failures = rounds(place, entered, overrides, ranks=options.ranks, number=options.rounds, warm=not options.no_warm_up)
    result = {
        "benchmark": "launch",
        **origin,
        "ranks": options.ranks,
        "rounds": options.rounds,
        "skipped": skipped,
        "failures": failures,
        "seconds": lives,
        "contestants": {name: row for name, row in summary(lives).items() if row},
    }
    write_json(options.json, result)
    for name, row in result["contestants"].items():
        print(f"{name}: " + "  ".join(f"{metric} {value['median']:.2f}" for metric, value in row.items()))
    print(*(f"{name} skipped: {reason}" for name, reason in skipped.items()), f"-> {options.json}", sep="\n")
    return 1 if failures else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m efflaunch.bench.launch", description="What a launcher costs.")
    parser.add_argument("--json", type=Path, required=True, help="where the result goes")
    parser.add_argument("--rounds", type=int, default=3, help="lives of every contestant")
    parser.add_argument("--ranks", type=int, default=2, help="of every contestant; on a cluster as many nodes with one rank each")
    parser.add_argument("--contestants", default=",".join(CONTESTANTS), help="of " + ",".join(CONTESTANTS))
    parser.add_argument("--folder", help="where runs and clusters live for a while; the system's temporary folder if not given")
    parser.add_argument("--no-warm-up", action="store_true", help="count the first life too, with whatever is not yet in memory")
    parser.add_argument("overrides", nargs="*", help="for every run, after the benchmark's own")
    return parser


def rounds(
    folder: Path, entered: dict[str, Contestant], overrides: list[str], *, ranks: int, number: int, warm: bool
) -> tuple[dict[str, list[dict[str, float]]], list[str]]:
    """(times of every life by contestant, what went wrong), the contestants taking turns."""
    lives: dict[str, list[dict[str, float]]] = {name: [] for name in entered}
    failures = []
    for turn in range(-1 if warm else 0, number):
        for name, entry in entered.items():
            try:
                with entry.place(folder / f"{name}-{turn}", overrides, ranks) as place:
                    times = life(place, ranks, whole=turn >= 0)
            except (RuntimeError, TimeoutError, LookupError) as error:
                failures.append(f"{name}, round {turn}: {error}")
                continue
            seconds = "  ".join(f"{metric} {value:.2f}" for metric, value in times.items())
            when = f"round {turn + 1} of {number}" if turn >= 0 else "warm-up"
            print(f"{when}, {name}: {seconds}", file=sys.stderr, flush=True)
            if turn >= 0:
                lives[name].append(times)
    return lives, failures


def life(place: Place, ranks: int, *, whole: bool) -> dict[str, float]:
    """Seconds by METRICS of one run, from its start to its end; not `whole`: only to warm files."""
    times: dict[str, float] = {}
    began = time.time()
    place.start()
    times["start_s"] = next_step(place, began) - began
    wait_for_steps(place)
    if whole:
        died = time.time()
        os.kill(place.pid(ranks - 1), signal.SIGKILL)
        times["rank_death_s"] = next_step(place, died, after_start=True) - died
        wait_for_steps(place)
        died = time.time()
        if place.lose_node():
            times["node_death_s"] = next_step(place, died, after_start=True) - died
            wait_for_steps(place)
    stop_sent = time.time()
    place.stop()
    times["stop_s"] = _until(place.ended, "the end") - stop_sent
    return times


def next_step(place: Place, since: float, *, after_start: bool = False) -> float:
    """Return when the first step after `since` was finished; `after_start`: by ranks that were started after it."""

    def newer_step() -> float | None:
        place.check()
        started = not after_start
        for event in _events(place.run_dir):
            if event["time"] > since:
                started = started or event["event"] == "start"
                if started and event["event"] == "step":
                    return float(event["time"])
        return None

    return _until(newer_step, "a step")


def wait_for_steps(place: Place) -> None:
    """Some steps on, as in the middle of a run."""
    before = len(_steps(place))

    def enough_steps() -> float | None:
        place.check()
        return time.time() if len(_steps(place)) >= before + _STEPS_BETWEEN else None

    _until(enough_steps, "more steps")


def _steps(place: Place) -> list[dict[str, Any]]:
    return [event for event in _events(place.run_dir) if event["event"] == "step"]


def _events(run_dir: Path) -> list[dict[str, Any]]:
    # Not through the launcher's reader: a bare rank writes no more of a step than its number and time.
    try:
        lines = (run_dir / "metrics.jsonl").read_text(encoding="utf-8").split("\n")
    except FileNotFoundError:
        return []
    return [json.loads(line) for line in lines[:-1] if line.startswith("{") and line.endswith("}")]


def _until(look: Callable[[], float | None], what: str) -> float:
    deadline = time.monotonic() + LIMIT_S
    while time.monotonic() < deadline:
        value = look()
        if value is not None:
            return value
        time.sleep(0.02)
    raise TimeoutError(f"waited {LIMIT_S:g} s for {what}")


def summary(lives: dict[str, list[dict[str, float]]]) -> dict[str, dict[str, dict[str, float]]]:
    """Median and minimum of each metric; `over_elastic`: of the differences within a round, their median. Pure."""
    medians: dict[str, dict[str, dict[str, float]]] = {}
    for name, rows in lives.items():
        medians[name] = {}
        for metric in METRICS:
            values = [row[metric] for row in rows if metric in row]
            if values:
                medians[name][metric] = {"median": statistics.median(values), "min": min(values)}
                pairs = _differences(rows, lives.get(BASE, []), metric)
                if name != BASE and pairs:
                    medians[name][metric]["over_elastic"] = statistics.median(pairs)
    return medians


def _differences(rows: Iterable[dict[str, float]], base: Iterable[dict[str, float]], metric: str) -> list[float]:
    return [row[metric] - other[metric] for row, other in zip(rows, base, strict=False) if metric in row and metric in other]


def make_corpus(prefix: Path) -> Path:
    """A few hundred documents of steady numbers."""
    import numpy as np

    from ..training.data.writer import IndexedWriter

    generator = np.random.default_rng(0)
    writer = IndexedWriter(str(prefix), "uint16")
    for length in np.minimum(generator.lognormal(4.5, 1.0, 400).astype(int) + 2, 500):
        writer.add(np.cumsum(generator.integers(0, 3, length)) % 4096)
    writer.finish()
    return prefix


if __name__ == "__main__":
    raise SystemExit(main())
