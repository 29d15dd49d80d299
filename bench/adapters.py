"""`python -m efflaunch.bench.adapters --json FILE`: LoRA here against peft with gradient checkpointing, and against training everything.

One process, no GPU, a model with Llama-8B's ratios; the same factors in all. Bytes are exact live bytes of a warm step (tracer.py) at two
lengths: the slope is what a token takes. Times are interleaved rounds, ratios within a round; processor seconds beside wall seconds.

Headline keys: `bytes_ratio`, bytes a token of LoRA under memory=auto where everything is full, over peft's; `time_ratio` of each contestant
over peft, the median of the rounds.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .record import machine, write_json
from .slopes import fit_line

if TYPE_CHECKING:
    from ..memory.policy import MemoryPolicy
    from .contest import Build, Entry
    from .peers.shape import Task

BASE = "peft_checkpointing"
FULL = "llama8b_lora_1M_1gpu"
"""The experiment whose memory=auto is what is measured where everything is full."""
RANK = 8


def main(arguments: list[str] | None = None) -> int:
    options, origin = _parser().parse_args(arguments), machine()
    import torch

    torch.set_num_threads(1)
    entered = contestants(policies(_task(options, options.time_tokens), options.chunk))
    rows = {name: _bytes(entry.build, _task(options, 0), options.lengths) for name, entry in entered.items()}
    result = {
        "benchmark": "adapters",
        **origin,
        "settings": {key: value for key, value in vars(options).items() if key != "json"},
        "rank": RANK,
        "gradient_error": gradient_error(entered),
        "rows": rows,
        "bytes_ratio": rows["lora_auto"]["bytes_per_token"] / rows[BASE]["bytes_per_token"],
        **_times(entered, _task(options, options.time_tokens), options.rounds),
    }
    write_json(options.json, result)
    print(f"bytes_ratio {result['bytes_ratio']:.3f}  time_ratio {result['time_ratio']['lora_auto']:.3f}  -> {options.json}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m efflaunch.bench.adapters", description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--json", type=Path, required=True, help="where the result goes")
    parser.add_argument("--shape", default="8x32", help="heads x head dim")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--lengths", type=int, nargs=2, default=[1024, 2048], help="tokens at which bytes are measured")
    parser.add_argument("--chunk", type=int, default=256, help="tokens of a chunk, where a policy has chunks")
    parser.add_argument("--time-tokens", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=5)
    return parser


def _task(options: argparse.Namespace, num_tokens: int) -> Task:
    from .peers.shape import Chunks, Shape, Task

    heads, dim = options.shape.split("x")
    chunks = Chunks(layer=options.chunk, loss=64, streambp_layer=options.chunk, streambp_loss=64)
    return Task(Shape(int(heads), int(dim)), options.layers, num_tokens, chunks, dtype="float32")


def policies(task: Task, chunk_tokens: int) -> dict[str, MemoryPolicy]:
    """What memory=auto is solved to: `lora` and `auto` where everything is full, `auto_with_room` for `task` with memory to spare."""
    from ..launcher.config.compose import compose
    from ..launcher.config.ledger import plan
    from .peers.ours import auto_policies, with_chunks

    solved = auto_policies(task) | {"lora": plan(compose([f"+experiment={FULL}"])).inputs.policy}
    return {name: with_chunks(policy, chunk_tokens) for name, policy in solved.items()}


def contestants(solved: Mapping[str, MemoryPolicy]) -> dict[str, Entry]:
    """All that is measured by name, under the policies of `policies`."""
    from ..model.adapters.config import AdapterConfig, AdapterMethod
    from .contest import Entry
    from .peers.adapted import Adapted, PeftLora
    from .peers.ours import Ours

    lora = AdapterConfig(name="lora", method=AdapterMethod.LORA, rank=RANK)
    packed, room = replace(lora, method=AdapterMethod.QLORA), solved["auto_with_room"]
    return {
        BASE: Entry(partial(PeftLora, rank=RANK)),
        "lora_auto": Entry(partial(Adapted, policy=solved["lora"], adapter=lora), solved["lora"]),
        "lora_auto_with_room": Entry(partial(Adapted, policy=room, adapter=lora), room),
        "qlora_auto": Entry(partial(Adapted, policy=solved["lora"], adapter=packed), solved["lora"]),
        "full_auto": Entry(partial(Ours, policy=solved["auto"]), solved["auto"]),
        "full_auto_with_room": Entry(partial(Ours, policy=room), room),
    }


def gradient_error(entered: Mapping[str, Entry]) -> float:
    """The worst relative distance of a factor's gradient from peft's, on a task of its own. RuntimeError where it is another function."""
    from .contest import CHECK, GRADIENT_TOLERANCE

    worst = 0.0
    peers = {name: entered[name].build(CHECK) for name in (BASE, "lora_auto", "lora_auto_with_room")}
    for contestant in peers.values():
        contestant.step()
    expected = peers[BASE].gradients()
    for name in ("lora_auto", "lora_auto_with_room"):
        computed = peers[name].gradients()
        if set(computed) != set(expected):
            raise RuntimeError(f"{name} trains other parameters than peft: {sorted(set(expected) ^ set(computed))}")
        worst = max(worst, *(float((computed[key] - value).norm() / value.norm()) for key, value in expected.items()))
    if not worst < GRADIENT_TOLERANCE:
        raise RuntimeError(f"other gradients than peft's: off by {worst:.2e}")
    return worst


def _bytes(build: Build, task: Task, lengths: list[int]) -> dict[str, Any]:
    from .contest import peak

    peaks = [peak(build(replace(task, num_tokens=length))) for length in lengths]
    device = [one.device_bytes for one in peaks]
    return {
        "device_bytes": device,
        "host_bytes": [one.host_bytes for one in peaks],
        "bytes_per_token": fit_line(list(zip(lengths, device, strict=True))).slope,
        "task": asdict(task),
    }


def _times(entered: Mapping[str, Entry], task: Task, rounds: int) -> dict[str, Any]:
    from .contest import ratios, timed_rounds

    taken = timed_rounds({name: entry.build(task) for name, entry in entered.items()}, rounds)
    return {"time_ratio": ratios(taken["seconds"], BASE), "processor_ratio": ratios(taken["processor_s"], BASE), **taken}


if __name__ == "__main__":
    raise SystemExit(main())
