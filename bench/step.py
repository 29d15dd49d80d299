"""`python -m efflaunch.bench.step --json FILE`: our step against plain Hugging Face + torch loops, throughput and peak.

Same model, weights and packed tokens; 1 and 2 gloo ranks; FSDP2 in all. Rounds are interleaved in time: each round runs
every contestant once, so a slow moment of the machine hits all, and ratios are taken within a round. Processor seconds of
rank 0 (one thread) are recorded beside wall seconds: on a busy machine they tell work from waiting. Peaks are exact live
bytes (tracer.py) of a warm step, on rank 0.

Headline keys: `throughput_ratio`, the lowest over ranks and policies of our tokens/s over the stronger peer's (median of the
rounds' ratios, keep against no checkpointing, recompute against gradient checkpointing); `processor_ratio`, the same in
processor seconds; `peak_ratio`, the highest over ranks of our peak with recompute over the lower peak of the two
checkpointing peers.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from .ranks import on_fresh_ranks
from .record import machine, write_json

Compete = Callable[[Any, Any, int], dict[str, Any]]
"""(workload, topology, rounds) -> what was measured, on every rank."""
STEP_MODEL: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 4096,
    "hidden_size": 256,
    "intermediate_size": 640,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 32768,
    "use_cache": False,
}
PAIRS = {"keep": ("stock", "varlen"), "recompute": ("stock_checkpointing", "varlen_checkpointing")}
"""Each of our policies and the peers that do the same work: the plain one and the stronger one."""


def main(arguments: list[str] | None = None) -> int:
    options, origin = _parser().parse_args(arguments), machine()
    sizes = tuple(int(part) for part in options.lengths.split(","))
    rows = {str(ranks): measure(sizes, ranks=ranks, rounds=options.rounds) for ranks in options.ranks}
    result = {
        "benchmark": "step",
        **origin,
        "model": STEP_MODEL,
        "lengths": sizes,
        "rounds": options.rounds,
        **summary(rows),
        "ranks": rows,
    }
    write_json(options.json, result)
    print(f"throughput_ratio {result['throughput_ratio']:.3f}  peak_ratio {result['peak_ratio']:.3f}  -> {options.json}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m efflaunch.bench.step", description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--json", type=Path, required=True, help="where the result goes")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--lengths", default="2048,1024,512,256,128,128", help="documents each rank packs into one row")
    return parser


def summary(rows: dict[str, Any]) -> dict[str, float]:
    """The headline figures: our worst case over ranks and policies."""
    throughput, processor = (
        [row[key][policy][stronger] for row in rows.values() for policy, (_, stronger) in PAIRS.items()]
        for key in ("ratios", "processor_ratios")
    )
    peaks = [row["peak_bytes"]["ours_recompute"] / min(row["peak_bytes"][peer] for peer in PAIRS["recompute"]) for row in rows.values()]
    return {"throughput_ratio": min(throughput), "processor_ratio": min(processor), "peak_ratio": max(peaks)}


def measure(lengths: tuple[int, ...], *, ranks: int, rounds: int, model: dict[str, Any] | None = None) -> dict[str, Any]:
    """All contestants on `ranks` fresh processes; the result is rank 0's."""
    return contest(_compete, model or STEP_MODEL, lengths, ranks=ranks, rounds=rounds)


def contest(compete: Compete, model: dict[str, Any], lengths: tuple[int, ...], *, ranks: int, rounds: int) -> dict[str, Any]:
    """What `compete(workload, topology, rounds)` of a module finds on fresh gloo ranks that share one group; the result is rank 0's."""
    return on_fresh_ranks(_rank_main, ranks, compete, model, lengths, rounds)


def _rank_main(
    rank: int, ranks: int, store: Path, compete: Compete, model: dict[str, Any], lengths: tuple[int, ...], rounds: int, results: Any
) -> None:
    import torch
    import torch.distributed as dist

    from ..parallel.topology import build_topology
    from .contestants import Workload

    os.environ.update(RANK=str(rank), WORLD_SIZE=str(ranks), LOCAL_RANK=str(rank))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=ranks)
    workload = Workload(model, lengths, loss_chunk_tokens=1024)
    figures = compete(workload, build_topology(replicate=1, device="cpu"), rounds)
    if rank == 0:
        results.put({**figures, "workload": asdict(workload)})
    dist.barrier()
    dist.destroy_process_group()


def _compete(workload: Any, topology: Any, rounds: int) -> dict[str, Any]:
    from .contestants import Ours, Peer, initial_weights

    weights = initial_weights(workload)
    policies = _policies()
    contestants: dict[str, Any] = {f"ours_{name}": Ours(workload, policy, topology, weights) for name, policy in policies.items()}
    for attention in ("stock", "varlen"):
        for checkpointing in (False, True):
            name = attention + "_checkpointing" * checkpointing
            contestants[name] = Peer(workload, topology, weights, varlen=attention == "varlen", checkpointing=checkpointing)
    losses = {name: same_loss(contestant) for name, contestant in contestants.items()}
    spread = max(losses.values()) - min(losses.values())
    if spread > 1e-4 * max(losses.values()):
        raise RuntimeError(f"contestants do not compute the same loss: {losses}")
    peaks = {name: step_peak(contestant) for name, contestant in contestants.items()}
    seconds, processor_s = timed_rounds(contestants, rounds)
    tokens = sum(workload.lengths) * topology.world_size
    return {
        "losses": losses,
        "peak_bytes": peaks,
        "seconds": seconds,
        "processor_s": processor_s,
        "tokens_per_s": {name: tokens / statistics.median(times) for name, times in seconds.items()},
        "ratios": _ratios(seconds),
        "processor_ratios": _ratios(processor_s),
    }


def _policies() -> dict[str, Any]:
    from ..memory.policy import MemoryPolicy

    return {"keep": MemoryPolicy(graph=True), "recompute": MemoryPolicy()}


def same_loss(contestant: Any) -> float:
    """Return the loss of the first step, which also warms up."""
    from .contestants import global_loss

    return global_loss(contestant.step())


def step_peak(contestant: Any) -> int:
    from ..memory.arena.tracer import StorageTracer

    with StorageTracer(contestant.tensors()) as tracer:
        contestant.step()
    return tracer.peak_bytes


def timed_rounds(contestants: dict[str, Any], rounds: int) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Wall and processor seconds of one step, every contestant once a round; the order turns, so that none always follows the same one."""
    import torch.distributed as dist

    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    processor_s: dict[str, list[float]] = {name: [] for name in contestants}
    names = list(contestants)
    for index in range(rounds):
        turn = index % len(names)
        for name in names[turn:] + names[:turn]:
            dist.barrier()
            started, used = time.perf_counter(), time.process_time()
            contestants[name].step()
            processor_s[name].append(time.process_time() - used)
            dist.barrier()
            seconds[name].append(time.perf_counter() - started)
    return seconds, processor_s


def _ratios(seconds: dict[str, list[float]]) -> dict[str, dict[str, float]]:
    """Our tokens/s over each peer's: the median of the ratios within a round."""

    def ratio(ours: str, peer: str) -> float:
        return statistics.median(theirs / mine for mine, theirs in zip(seconds[ours], seconds[peer], strict=True))

    return {policy: {peer: ratio(f"ours_{policy}", peer) for peer in peers} for policy, peers in PAIRS.items()}


if __name__ == "__main__":
    raise SystemExit(main())
