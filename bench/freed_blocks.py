"""`python -m efflaunch.bench.freed_blocks --json FILE`: a CPU rank with the C library's own ways against ours (utils/c_allocator.py).

The same small model is trained in one process for some steps, with glibc as it is and with freed blocks returned, in turns. Compared
are processor seconds of the steps (user and system, which other programs on the machine disturb least) and the growth of resident
memory. Keys: `processor_ratio`, ours over glibc's own, the median of the rounds; `resident_ratio`, of the resident memory beyond the
libraries after the last step.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import psutil

from ..utils.c_allocator import return_freed_blocks
from .record import machine, write_json

STEPS = 6


def main(arguments: list[str] | None = None) -> int:
    """Runs the rounds and writes the result."""
    parser = argparse.ArgumentParser(prog="python -m efflaunch.bench.freed_blocks", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", type=Path, help="where the result goes")
    parser.add_argument("--rank", choices=("own", "returned"), help="run one contestant in this process and print its figures")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=4096, help="of the one document of a step")
    options, origin = parser.parse_args(arguments), machine()
    if options.rank is not None:
        print(json.dumps(run_rank(options.rank, options.tokens)))
        return 0
    if options.json is None:
        parser.error("--json FILE is needed")
    rounds = [{name: _trained(name, options.tokens) for name in ("own", "returned")} for _ in range(options.rounds)]
    result = {"benchmark": "freed_blocks", **origin, **summary(rounds), "rounds": rounds}
    write_json(options.json, result)
    print(f"processor_ratio {result['processor_ratio']:.3f}  resident_ratio {result['resident_ratio']:.3f}  -> {options.json}")
    return 0


def summary(rounds: list[dict[str, dict[str, float]]]) -> dict[str, float]:
    """Medians over rounds of ours over glibc's own."""
    ratio = {key: statistics.median(row["returned"][key] / row["own"][key] for row in rounds) for key in ("processor_s", "resident_bytes")}
    return {"processor_ratio": ratio["processor_s"], "resident_ratio": ratio["resident_bytes"]}


def _trained(name: str, tokens: int) -> dict[str, float]:
    command = [sys.executable, "-m", "efflaunch.bench.freed_blocks", "--rank", name, "--tokens", str(tokens)]
    done = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=True)
    figures: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return figures


def run_rank(name: str, tokens: int) -> dict[str, float]:
    """Run one process without peers and return processor seconds of STEPS warm steps, and resident bytes they leave."""
    import torch.distributed as dist

    from .traced import Case, build_case, memory_config

    if name == "returned":
        assert return_freed_blocks(), "this C library cannot be told"
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    step, *_ = build_case(Case(name="freed", tokens=tokens, memory=memory_config(activations="keep", attention_output="keep")))
    before = psutil.Process().memory_info().rss
    step()
    begun = time.process_time()
    for _ in range(STEPS):
        step()
    figures = {"processor_s": time.process_time() - begun, "resident_bytes": float(psutil.Process().memory_info().rss - before)}
    dist.destroy_process_group()
    return figures


if __name__ == "__main__":
    sys.exit(main())
