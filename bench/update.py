"""`python -m efflaunch.bench.update --json FILE`: the estimate of the optimizer's update against updates of real ranks.

Gloo ranks on CPU, a real model, one thread each. Rounds measure the node's rates (training/profiling/node_rates.py, as `efflaunch
profile` does), an empty backward pass, and one with each kind of update: what that takes longer is the update, with the
gradients' way to the host and back where states live there. Predictions are estimate/timing/update.py's, in which nothing
overlaps without a GPU; so processor seconds of all threads are measured, which other programs on the machine do not lengthen. Of
rates the fastest count and of seconds the least: what disturbs a round is not the machine's.

Headline key: `worst_error`, the largest |predicted / measured - 1| of the residencies.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .ranks import on_fresh_ranks
from .record import machine, write_json

MODEL = (
    "+experiment=quickstart", "model=tiny", "model.num_layers=6", "model.hidden_size=512", "model.intermediate_size=1408",
    "model.num_heads=8", "model.num_kv_heads=4", "model.vocab_size=8192", "data.vocab_size=8192", "memory=recompute",
    "data.max_seq_len=1K", "data.global_batch_tokens=2K", "parallel.tokens_per_rank=1K", "optim.grad_clip=null",
)  # fmt: skip
CASES = {
    "on the device, after backward": (),
    "on the device, in backward": ("optim.update=backward",),
    "on the host, after backward": ("optim.state_device=host",),
    "on the host, in backward": ("optim.state_device=host", "optim.update=backward"),
}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m efflaunch.bench.update", description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--json", type=Path, required=True, help="where the result goes")
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="changes to the model")
    options, origin = parser.parse_args(arguments), machine()
    figures = on_fresh_ranks(_rank_main, options.ranks, [f"cluster.ranks_per_node={options.ranks}", *options.overrides], options.rounds)
    result = {"benchmark": "update", **origin, "ranks": options.ranks, "rounds": options.rounds, **figures, **summary(figures["rows"])}
    write_json(options.json, result)
    print(f"worst error {result['worst_error']:.0%} over {len(figures['rows'])} residencies  -> {options.json}")
    return 0


def summary(rows: list[dict[str, Any]]) -> dict[str, float]:
    """The headline figure."""
    return {"worst_error": max(abs(row["ratio"] - 1.0) for row in rows)}


def _rank_main(rank: int, ranks: int, store: Path, words: list[str], rounds: int, results: Any) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(ranks), LOCAL_RANK=str(rank))
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=ranks)
    figures = _measured(words, rounds)
    if rank == 0:
        results.put(figures)
    dist.barrier()
    dist.destroy_process_group()


def _measured(words: list[str], rounds: int) -> dict[str, Any]:
    """Measure updates of every residency on a rank. Collective."""
    import torch

    from ..launcher.config.compose import compose
    from ..training.profiling.probe import Prober

    probers = {name: Prober.of(compose([*MODEL, *words, *changes]), torch.device("cpu")) for name, changes in CASES.items()}
    plain = next(iter(probers.values()))
    seen: list[Any] = []
    passes: list[float] = []
    steps: dict[str, list[float]] = {name: [] for name in CASES}
    for index in range(rounds + 1):
        seen.append(_rates(plain))
        passes.append(_pass_s(plain))
        for name, prober in probers.items():
            steps[name].append(_step_s(prober))
        if index == 0:  # buffers, states and threads begin
            seen, passes, steps = [], [], {name: [] for name in CASES}
    best, pass_s = _best(seen), min(passes)
    rows = [_row(name, _predicted_s(prober, best), min(steps[name]) - pass_s, pass_s) for name, prober in probers.items()]
    return {"parameters": plain.inputs.parameters, "rows": rows}


def _row(name: str, predicted_s: float, measured_s: float, pass_s: float) -> dict[str, Any]:
    return {"name": name, "predicted_s": predicted_s, "measured_s": measured_s, "pass_s": pass_s, "ratio": predicted_s / measured_s}


def _rates(prober: Any) -> Any:
    from ..training.profiling.node_rates import measure_rates

    return measure_rates(prober.device, prober.config.cluster.ranks_per_node, None, 1.0)


def _best(seen: list[Any]) -> Any:
    """The fastest of each, which is what the least seconds go with."""
    from dataclasses import replace

    from ..cluster.rates import Copies

    ranks = range(len(seen[0].link))
    names = ("out", "back", "both_out", "both_back")
    link = tuple(Copies(**{name: max(getattr(rates.link[rank], name) for rates in seen) for name in names}) for rank in ranks)
    device, host = (max(getattr(rates, name) for rates in seen) for name in ("device_update", "host_update"))
    return replace(seen[0], link=link, device_update=device, host_update=host)


def _predicted_s(prober: Any, rates: Any) -> float:
    from dataclasses import replace

    from ..cluster.rates import MeasuredRates
    from ..estimate.timing.update import update_time

    return update_time(replace(prober.inputs, measured=MeasuredRates(rates=rates, source="here"))).shown_s


def _pass_s(prober: Any) -> float:
    """An empty backward pass whose gradients are thrown away."""
    return _least_s(prober, prober.updater.discard)


def _step_s(prober: Any) -> float:
    """An empty backward pass and the update."""

    def update() -> None:
        prober.updater.finish()
        prober.updater.apply()

    return _least_s(prober, update)


def _least_s(prober: Any, end: Callable[[], None]) -> float:
    """Processor seconds, of all threads; the least of three, for what disturbs one of them is not the update's; the slowest rank's."""
    import torch.distributed as dist

    from ..training.micro_batches import EMPTY

    seconds = []
    for _ in range(3):
        dist.barrier()
        begun = time.process_time()
        prober._backward([EMPTY], None)
        end()
        seconds.append(prober.agreed(time.process_time() - begun))
    return min(seconds)


if __name__ == "__main__":
    raise SystemExit(main())
