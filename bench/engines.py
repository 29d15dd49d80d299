"""`python -m efflaunch.bench.engines --json FILE`: our step under each engine against the same engines driven plainly.

Same model, weights and packed tokens on gloo ranks, recompute against gradient checkpointing, all weights sharded: FSDP2 and DeepSpeed's
ZeRO-3. Rounds are interleaved as in bench/step.py, ratios are medians of the rounds'. Start-up is the time until a contestant's first
step is done, its libraries imported. Peaks are exact live bytes of a warm step on rank 0, what is held between steps counted.

Keys: `vs_plain_deepspeed`, our tokens/s under DeepSpeed over DeepSpeed driven plainly; `vs_plain_fsdp`, ours under FSDP2 over a plain
FSDP2 loop; `peak_vs_plain_deepspeed` and `peak_vs_plain_fsdp`, our peak over theirs.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .record import machine, write_json
from .step import STEP_MODEL, contest, same_loss, step_peak, timed_rounds

PAIRS = {"deepspeed": ("ours_deepspeed", "plain_deepspeed"), "fsdp": ("ours_torch", "plain_fsdp")}
"""Our step under an engine, and the engine driven plainly."""


def main(arguments: list[str] | None = None) -> int:
    options, origin = _parser().parse_args(arguments), machine()
    lengths = tuple(int(part) for part in options.lengths.split(","))
    row = measure(lengths, ranks=options.ranks, rounds=options.rounds)
    settings = {"model": STEP_MODEL, "lengths": lengths, "rounds": options.rounds, "ranks": options.ranks}
    result = {"benchmark": "engines", **origin, **settings, **summary(row), **row}
    write_json(options.json, result)
    print(f"vs_plain_deepspeed {result['vs_plain_deepspeed']:.3f}  vs_plain_fsdp {result['vs_plain_fsdp']:.3f}  -> {options.json}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m efflaunch.bench.engines", description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--json", type=Path, required=True, help="where the result goes")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--lengths", default="2048,1024,512,256,128,128", help="documents each rank packs into one row")
    return parser


def summary(row: dict[str, Any]) -> dict[str, float]:
    """The headline figures: throughput and peak of each engine under us over the engine driven plainly."""
    figures = {}
    for name, (ours, plain) in PAIRS.items():
        pairs = zip(row["seconds"][ours], row["seconds"][plain], strict=True)
        figures[f"vs_plain_{name}"] = statistics.median(theirs / mine for mine, theirs in pairs)
        figures[f"peak_vs_plain_{name}"] = row["peak_bytes"][ours] / row["peak_bytes"][plain]
    return figures


def measure(lengths: tuple[int, ...], *, ranks: int, rounds: int, model: dict[str, Any] | None = None) -> dict[str, Any]:
    """All contestants on `ranks` fresh processes; the result is rank 0's."""
    return contest(_compete, model or STEP_MODEL, lengths, ranks=ranks, rounds=rounds)


def _compete(workload: Any, topology: Any, rounds: int) -> dict[str, Any]:
    contestants: dict[str, Any] = {}
    losses, startup_s = {}, {}
    for name, make in _makers(workload, topology).items():
        began = time.perf_counter()
        contestants[name] = make()
        losses[name] = same_loss(contestants[name])
        startup_s[name] = time.perf_counter() - began
    if max(losses.values()) - min(losses.values()) > 1e-4 * max(losses.values()):
        raise RuntimeError(f"contestants do not compute the same loss: {losses}")
    peaks = {name: step_peak(contestant) for name, contestant in contestants.items()}
    seconds, processor_s = timed_rounds(contestants, rounds)
    tokens = sum(workload.lengths) * topology.world_size
    return {
        "losses": losses,
        "startup_s": startup_s,
        "peak_bytes": peaks,
        "seconds": seconds,
        "processor_s": processor_s,
        "tokens_per_s": {name: tokens / statistics.median(times) for name, times in seconds.items()},
    }


def _makers(workload: Any, topology: Any) -> dict[str, Callable[[], Any]]:
    """What makes each contestant, libraries imported."""
    from ..memory.policy import MemoryPolicy
    from ..parallel.sharding.deepspeed import load_deepspeed
    from .contestants import DEVICE, Ours, Peer, initial_weights
    from .engine_contestants import OursZero, PlainZero

    load_deepspeed(DEVICE)
    weights, policy = initial_weights(workload), MemoryPolicy()
    return {
        "ours_torch": lambda: Ours(workload, policy, topology, weights),
        "ours_deepspeed": lambda: OursZero(workload, policy, topology, weights),
        "plain_fsdp": lambda: Peer(workload, topology, weights, varlen=True, checkpointing=True),
        "plain_deepspeed": lambda: PlainZero(workload, topology, weights, checkpointing=True),
    }


if __name__ == "__main__":
    raise SystemExit(main())
