"""`python -m efflaunch.bench.families --json FILE`: every dense family beside Hugging Face with gradient checkpointing, on one CPU process.

Of each family: how far the gradients of a tiny copy are from Hugging Face's in float64 (model/proof); and of a small model in float32 the
processor seconds of a step and its peak live bytes, at equal shapes: documents of equal length, one forward each for Hugging Face, one
pack here, by the policy `streambp`. The least of several rounds, both sides in turns.

Headline keys: `worst_error`; `least_speedup`, Hugging Face's seconds over ours; `most_memory`, our bytes over Hugging Face's.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..model.config import Family, ModelConfig
from ..model.families import FACTS
from ..model.hf_fields import hf_config_dict
from .ranks import on_fresh_ranks
from .record import machine, write_json
from .traced import MODEL, Case, build_case, memory_config

TARGETS = {"error": 1e-10, "speedup": 1.0, "memory": 0.7}
WINDOW = 512


@dataclass(frozen=True, slots=True)
class Sizes:
    """What is run of each family."""

    tokens: int = 4096
    documents: int = 2
    rounds: int = 3
    vocabulary: int = 8192
    hidden: int = 256


@dataclass(frozen=True, slots=True)
class Side:
    """One of the two sides: a step, and what it keeps between steps."""

    step: Callable[[], None]
    tensors: Callable[[], list[Any]]


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark and write FILE."""
    options, origin = _parser().parse_args(arguments), machine()
    sizes = Sizes(options.tokens, options.documents, options.rounds)
    chosen = [family for family in dense_families() if options.only in family.value]
    rows = on_fresh_ranks(_rank_main, 1, [family.value for family in chosen], sizes)["rows"]
    result = {"benchmark": "families", **origin, "targets": TARGETS, **summary(rows), "rows": rows}
    write_json(options.json, result)
    figures = f"error {result['worst_error']:.0e}, {result['least_speedup']:.2f} x, {result['most_memory']:.2f} of the memory"
    print(f"{len(rows)} families: {figures} at worst  -> {options.json}")
    return 0


def dense_families() -> list[Family]:
    """The families without experts: those of experts have a benchmark of their own (experts.py)."""
    return [family for family, facts in FACTS.items() if facts.experts is None]


def summary(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Headline figures of all rows."""
    return {
        "worst_error": max(row["error"] for row in rows),
        "least_speedup": min(row["their_s"] / row["our_s"] for row in rows),
        "most_memory": max(row["our_bytes"] / row["their_bytes"] for row in rows),
    }


def model_of(family: Family, sizes: Sizes) -> dict[str, Any]:
    """Changes to traced.MODEL: a small model of the family."""
    facts = FACTS[family]
    window = {"sliding_window": WINDOW} if facts.has_window and facts.needs_window else {}
    inner = 5 * sizes.hidden // 2
    return {"family": family, "vocab_size": sizes.vocabulary, "hidden_size": sizes.hidden, "intermediate_size": inner, **window}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m efflaunch.bench.families", description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--json", type=Path, required=True, help="where the result goes")
    parser.add_argument("--only", default="", help="families whose name contains this")
    parser.add_argument("--tokens", type=int, default=Sizes().tokens, help="tokens of a step")
    parser.add_argument("--documents", type=int, default=Sizes().documents, help="documents they are")
    parser.add_argument("--rounds", type=int, default=Sizes().rounds, help="steps that are timed on either side")
    return parser


def _rank_main(rank: int, ranks: int, store: Path, families: list[str], sizes: Sizes, results: Any) -> None:
    import torch.distributed as dist

    os.environ.update(RANK=str(rank), WORLD_SIZE=str(ranks), LOCAL_RANK=str(rank))
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=ranks)
    results.put({"rows": [measured(Family(name), sizes) for name in families]})
    dist.destroy_process_group()


def measured(family: Family, sizes: Sizes) -> dict[str, Any]:
    """The row of one family. Needs a process group of this rank alone."""
    from ..model.proof.compare import compare
    from ..model.proof.tiny_config import tiny_config

    case = Case(
        name=family.value, tokens=sizes.tokens, documents=sizes.documents, model=model_of(family, sizes),
        memory=memory_config(attention="chunks", chunk_tokens=256),
    )  # fmt: skip
    config = ModelConfig(**{**MODEL, **case.model})
    error = compare(tiny_config(config)).worst_parameter[1]
    step, tensors, _ = build_case(case)
    sides = {"our": Side(step, tensors), "their": _hugging_face(config, case)}
    row: dict[str, Any] = {"name": family.value, "tokens": sizes.tokens, "documents": sizes.documents, "error": max(error.values())}
    row |= {f"{name}_s": seconds for name, seconds in _seconds(sides, sizes.rounds).items()}
    return row | {f"{name}_bytes": _peak(side) for name, side in sides.items()}


def _hugging_face(config: ModelConfig, case: Case) -> Side:
    """The plain model with gradient checkpointing and AdamW, the same documents one after the other."""
    import numpy as np
    import torch
    from transformers import AutoModelForCausalLM

    from ..model.build import build_config

    model = AutoModelForCausalLM.from_config(build_config(hf_config_dict(config)), dtype=torch.float32).train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    ids = torch.from_numpy(np.random.default_rng(0).integers(0, model.config.vocab_size, case.length))
    documents = ids.tensor_split(case.documents)

    def step() -> None:
        for document in documents:
            row = document.unsqueeze(0)
            model(input_ids=row, labels=row, use_cache=False, num_items_in_batch=case.length - case.documents).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    def tensors() -> list[Any]:
        states = [value for state in optimizer.state.values() for value in state.values() if isinstance(value, torch.Tensor)]
        return [*model.parameters(), *states]

    return Side(step, tensors)


def _seconds(sides: dict[str, Side], rounds: int) -> dict[str, float]:
    """The least processor seconds of a step of each side, taken in turns; a first step of each is not counted."""
    least: dict[str, float] = {}
    for side in sides.values():
        side.step()
    for _ in range(rounds):
        for name, side in sides.items():
            start = time.process_time()
            side.step()
            least[name] = min(least.get(name, float("inf")), time.process_time() - start)
    return least


def _peak(side: Side) -> int:
    from ..memory.arena.tracer import StorageTracer

    with StorageTracer(side.tensors()) as tracer:
        side.step()
    return tracer.peak_bytes


if __name__ == "__main__":
    raise SystemExit(main())
