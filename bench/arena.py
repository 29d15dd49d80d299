"""`python -m efflaunch.bench.arena --json FILE [INSTANCE…]`: how low the arena planner gets, against the lower bound.

Traces of this project's own steps at the size they are meant for: real models, fake tensors, so that a step of 128K tokens is
traced without its memory. For each the height of the plan over the most bytes alive at one time, and what torch's caching
allocator would reserve, simulated. Files in minimalloc's CSV format (id,lower,upper,size) are planned beside them.

Headline keys: `worst_ratio`, the highest height over max-live of our own traces (aim: 1.01 or less), and `slowest_plan_s`.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from ..memory.arena.trace import Trace
from .record import machine, write_json

ALIGNMENT = 512
"""Alignment of blocks in torch's CUDA allocator, in bytes."""
TARGETS = {"worst_ratio": 1.01, "slowest_plan_s": 20.0}
LLAMA_8B: dict[str, Any] = {
    "model_type": "llama", "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336,
    "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 1 << 20,
}  # fmt: skip
QWEN3_8B = {**LLAMA_8B, "model_type": "qwen3", "vocab_size": 151936, "intermediate_size": 12288, "head_dim": 128}
GEMMA2_9B = {
    **LLAMA_8B, "model_type": "gemma2", "vocab_size": 256000, "hidden_size": 3584, "num_attention_heads": 16,
    "head_dim": 256, "sliding_window": 4096, "pad_token_id": None,
}  # fmt: skip
MISTRAL_7B = {**LLAMA_8B, "model_type": "mistral", "vocab_size": 32000, "sliding_window": 4096}
K = 1024


def main(arguments: list[str] | None = None) -> int:
    options, origin = _parser().parse_args(arguments), machine()
    own = list(own_traces(options.layers).items())[: options.own]
    rows = [measure(name, make, options.seconds) for name, make in own]
    files = [measure(path.name, partial(_instance, path), options.seconds, alignment=1) for path in options.instances]
    result = {
        "benchmark": "arena",
        **origin,
        "layers": options.layers,
        "targets": TARGETS,
        **summary(rows),
        "rows": rows,
        "instances": files,
    }
    write_json(options.json, result)
    worst = "" if not rows else f"worst_ratio {result['worst_ratio']:.5f} of "
    print(f"{worst}{len(rows)} traces, {len(files)} files  -> {options.json}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m efflaunch.bench.arena", description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--json", type=Path, required=True, help="where the result goes")
    parser.add_argument("--layers", type=int, default=4, help="decoder layers of the traced models")
    parser.add_argument("--seconds", type=float, default=18.0, help="most time for one plan")
    parser.add_argument("--own", type=int, default=99, help="how many of our own traces")
    parser.add_argument("instances", type=Path, nargs="*", help="CSV files: id,lower,upper,size")
    return parser


def _instance(path: Path) -> Trace:
    from ..memory.arena.instances import read_instance

    return read_instance(path)


def summary(rows: list[dict[str, Any]]) -> dict[str, float]:
    """The headline figures; none without traces of our own."""
    return {"worst_ratio": max(row["ratio"] for row in rows), "slowest_plan_s": max(row["plan_s"] for row in rows)} if rows else {}


def measure(name: str, make: Callable[[], Trace], seconds: float, *, alignment: int = ALIGNMENT) -> dict[str, Any]:
    """Plan an arena for one trace, check the plan and return its figures."""
    from ..memory.arena.plan import check_plan, plan_arena
    from ..memory.arena.search import Budget
    from ..memory.arena.simulate import reserved_bytes

    started = time.perf_counter()
    trace = make()
    trace_s, started = time.perf_counter() - started, time.perf_counter()
    plan = plan_arena(trace, alignment=alignment, budget=Budget(wall_s=seconds))
    plan_s = time.perf_counter() - started
    check_plan(plan, trace)
    simulated = {kind: reserved_bytes(trace, expandable=kind == "expandable") / plan.max_live for kind in ("caching", "expandable")}
    row = {
        "name": name,
        "allocations": len(trace),
        "max_live_bytes": plan.max_live,
        "height_bytes": plan.height,
        "ratio": plan.ratio,
        "plan_s": plan_s,
        "trace_s": trace_s,
        "work": plan.work,
        "method": plan.method,
        "simulated_ratio": simulated,
    }
    print(f"{name}: {plan.describe()}; {plan_s:.1f} s", flush=True)
    return row


def own_traces(layers: int) -> dict[str, Callable[[], Trace]]:
    """Return functions that trace one step of a setting each, by the setting's name."""
    from ..memory.config import AttentionTiling
    from ..memory.policy import KEPT, MemoryPolicy

    keep, recompute = MemoryPolicy(graph=True), MemoryPolicy()
    chunks = MemoryPolicy(chunk_tokens=16 * K)
    descending = MemoryPolicy(chunk_tokens=16 * K, attention=AttentionTiling.CHUNKS)
    settings: dict[str, tuple[dict[str, Any], MemoryPolicy, tuple[tuple[int, ...], ...]]] = {
        "Llama 8B, keep, 128K": (LLAMA_8B, keep, ((128 * K,),)),
        "Llama 8B, recompute, 128K": (LLAMA_8B, recompute, ((128 * K,),)),
        "Llama 8B, attention kept, 20000 tokens": (LLAMA_8B, MemoryPolicy(attention_output=KEPT), ((20000,),)),
        "Llama 8B, chunks of 16K, 128K": (LLAMA_8B, chunks, ((128 * K,),)),
        "Llama 8B, descending chunks (streambp), 128K": (LLAMA_8B, descending, ((128 * K,),)),
        "Llama 8B, 4 head groups (upipe), 128K": (LLAMA_8B, MemoryPolicy(chunk_tokens=16 * K, head_groups=4), ((128 * K,),)),
        "Llama 8B, every 2nd input, 128K": (LLAMA_8B, MemoryPolicy(chunk_tokens=16 * K, segment_layers=2), ((128 * K,),)),
        "Qwen3 8B, packed 70000 + 50001 + 11071": (QWEN3_8B, recompute, ((70000, 50001, 11071),)),
        "Mistral 7B, window 4096, 32K": (MISTRAL_7B, recompute, ((32 * K,),)),
        "Gemma 2 9B, softcap and window, 16K": (GEMMA2_9B, recompute, ((16 * K,),)),
        "Llama 8B, two micro-batches of 64K and 40000": (LLAMA_8B, recompute, ((64 * K,), (30000, 10000))),
    }
    return {name: partial(_trace, fields, policy, batches, layers) for name, (fields, policy, batches) in settings.items()}


def _trace(fields: dict[str, Any], policy: Any, micro_batches: tuple[tuple[int, ...], ...], layers: int) -> Trace:
    import torch

    from ..memory.arena.fake import fake_tensors, trace_step

    with fake_tensors():
        rank = OneRank({**fields, "num_hidden_layers": layers}, policy, dtype=torch.bfloat16, loss_chunk_tokens=4 * K)

        def step() -> None:
            for documents in micro_batches:
                rank.step(documents, clear=False)
            rank.model.zero_grad()

        return trace_step(step, lambda: list(rank.model.parameters()))


class OneRank:
    """A model of ours on one rank, without process groups and sharding."""

    rank, stage_rank, world_size = 0, 0, 1

    def __init__(self, fields: dict[str, Any], policy: Any, *, dtype: Any, loss_chunk_tokens: int) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        from ..model.build import build_config, install
        from ..parallel.sequence.attention import CpuKernel

        self.model = AutoModelForCausalLM.from_config(build_config(fields), dtype=dtype)
        install(self.model, policy, loss_chunk_tokens=loss_chunk_tokens)
        self._kernel, self._device, self._vocabulary = CpuKernel(), torch.device("cpu"), fields["vocab_size"]

    def step(self, documents: tuple[int, ...], *, clear: bool = True) -> float:
        """Gradients of one micro-batch added to those there are (none with `clear`); the loss where tensors have values."""
        import torch
        from torch._subclasses.fake_tensor import FakeTensor

        from ..model.chunked_loss import cross_entropy
        from ..model.stage import Tokens
        from ..parallel.sequence.clock import BusyClock
        from ..parallel.sequence.layout import group_layout
        from ..parallel.sequence.plan import Group
        from ..parallel.sequence.runtime import sequence_attention

        if clear:
            self.model.zero_grad()
        group = Group(0, 1, 1, tuple(range(len(documents))))
        layout = group_layout(documents, ulysses=1, ring=1)
        attention: Any = sequence_attention(self, self._kernel, group, layout, BusyClock(self._device))  # type: ignore[arg-type]
        positions = torch.cat([torch.arange(length) for length in documents])
        lengths = torch.cat([torch.full((length,), length) for length in documents])
        ids = positions % self._vocabulary
        loss = self.model(Tokens(ids, ids, positions, lengths), attention, lambda head: cross_entropy(head, 1.0))
        loss.backward()
        return 0.0 if isinstance(loss, FakeTensor) else float(loss.detach())


if __name__ == "__main__":
    raise SystemExit(main())
