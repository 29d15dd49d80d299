"""`python -m efflaunch.bench.experts_step --json FILE`: a mixture of experts, forward and backward, against Hugging Face's own.

One block of a Qwen3-MoE (norm, router, experts) on one CPU rank in float32, the same weights and rows for all. Peers are transformers'
two ways through experts: `grouped_mm` (its default) and `eager`, a loop. Ours keeps gate and up (`keep`) or makes them again, a piece of
the rows after the other (`recompute`, with pieces as memory.chunk_tokens cuts them). Times are processor seconds, the contestants in
turns; peak bytes are what one pass holds beyond weights, their gradients and its input, counted and not timed. Keys: `speed_over_grouped`
and `speed_over_eager`, theirs over ours with `keep`, medians of the rounds; `peak_over_checkpointing`, ours with `recompute` over the
better of theirs with activation checkpointing.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from .record import machine, write_json

SHAPE = {"hidden": 512, "experts": 16, "per_token": 4, "inner": 256}
CHUNK = 256
"""Rows of a piece, with `recompute`."""
WAYS = ("ours, keep", "ours, recompute", "grouped_mm", "eager", "grouped_mm, checkpointing", "eager, checkpointing")


def main(arguments: list[str] | None = None) -> int:
    """Runs the rounds and writes the result."""
    parser = argparse.ArgumentParser(prog="python -m efflaunch.bench.experts_step", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", type=Path, required=True, help="where the result goes")
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=5)
    options, origin = parser.parse_args(arguments), machine()
    import torch

    torch.set_num_threads(1)
    passes = {way: _pass(way, options.tokens) for way in WAYS}
    _check_equal(passes)
    peaks = {way: _peak(run) for way, run in passes.items()}
    rounds = [{way: _processor_s(run) for way, run in passes.items()} for _ in range(options.rounds)]
    result = {
        "benchmark": "experts_step",
        **origin,
        "shape": {**SHAPE, "tokens": options.tokens},
        **summary(rounds, peaks),
        "peak_bytes": peaks,
        "rounds": rounds,
    }
    write_json(options.json, result)
    print(
        f"speed_over_grouped {result['speed_over_grouped']:.2f}  speed_over_eager {result['speed_over_eager']:.2f}  "
        f"peak_over_checkpointing {result['peak_over_checkpointing']:.2f}  -> {options.json}"
    )
    return 0


def summary(rounds: Sequence[dict[str, float]], peaks: dict[str, int]) -> dict[str, float]:
    """Headline figures: medians of theirs over ours in the same round, and bytes."""

    def speed(peer: str) -> float:
        return statistics.median(row[peer] / row["ours, keep"] for row in rounds)

    theirs = min(peaks["grouped_mm, checkpointing"], peaks["eager, checkpointing"])
    return {
        "speed_over_grouped": speed("grouped_mm"),
        "speed_over_eager": speed("eager"),
        "peak_over_checkpointing": peaks["ours, recompute"] / theirs,
    }


Pass = Callable[[], dict[str, Any]]
"""One forward and backward; returns the gradients by name, that of the rows as `rows`."""


def _layer(implementation: str) -> Any:
    """A decoder layer with random weights that are the same each time."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(
        "qwen3_moe", vocab_size=8, hidden_size=SHAPE["hidden"], intermediate_size=8, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=4, head_dim=32, num_experts=SHAPE["experts"], num_experts_per_tok=SHAPE["per_token"],
        moe_intermediate_size=SHAPE["inner"], norm_topk_prob=True,
    )  # fmt: skip
    config._experts_implementation = implementation
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).model.layers[0].train()


def _pass(way: str, tokens: int) -> Pass:
    import torch

    name, _, how = way.partition(", ")
    layer = _layer("eager" if name == "ours" else name)
    generator = torch.Generator().manual_seed(1)
    rows, upstream = (torch.randn(tokens, SHAPE["hidden"], generator=generator) for _ in range(2))
    own = {key: weight for key, weight in layer.named_parameters() if key.startswith(("mlp.", "post_attention_layernorm"))}
    run = _ours(layer, own, how == "keep") if name == "ours" else _theirs(layer, own, checkpointing=bool(how))
    return lambda: run(rows, upstream)


def _theirs(layer: Any, own: dict[str, Any], *, checkpointing: bool) -> Callable[[Any, Any], dict[str, Any]]:
    import torch
    from torch.utils.checkpoint import checkpoint

    def block(x: Any) -> Any:
        return x + layer.mlp(layer.post_attention_layernorm(x).unsqueeze(0))[0]

    def run(rows: Any, upstream: Any) -> dict[str, Any]:
        leaf = rows.detach().requires_grad_()
        y = checkpoint(block, leaf, use_reentrant=False) if checkpointing else block(leaf)
        gradients = torch.autograd.grad(y, [leaf, *own.values()], upstream)
        return dict(zip(("rows", *own), gradients, strict=True))

    return run


class _Kept:
    """What a pass leaves: the routing, and gate and up where they are kept."""

    def __init__(self, *, everything: bool) -> None:
        self._everything, self._kept = everything, dict[str, tuple[Any, ...]]()

    def get(self, kind: Any) -> tuple[Any, ...] | None:
        return self._kept.get(kind.name)

    def put(self, kind: Any, tensors: Sequence[Any]) -> None:
        if kind.decision or self._everything:
            self._kept[kind.name] = tuple(tensors)


def _ours(layer: Any, own: dict[str, Any], keep: bool) -> Callable[[Any, Any], dict[str, Any]]:
    import torch

    from ..memory.executor.token_local import GradientSums
    from ..model.families import layer_adapter

    adapter = layer_adapter(layer, "qwen3_moe")
    feed_forward = adapter.feed_forward(adapter)

    def run(rows: Any, upstream: Any) -> dict[str, Any]:
        pieces, sums = rows.split(len(rows) if keep else CHUNK), GradientSums(list(own.values()))
        saved = [_Kept(everything=keep) for _ in pieces]
        y = torch.empty_like(rows)
        with torch.no_grad():
            for part, piece, left in zip(y.split(len(pieces[0])), pieces, saved, strict=True):
                part.copy_(feed_forward.forward(piece, left))
        d_rows = y  # whose values nobody needs any more
        for index in reversed(range(len(pieces))):
            place = slice(index * len(pieces[0]), index * len(pieces[0]) + len(pieces[index]))
            d_rows[place] = feed_forward.backward(pieces[index], upstream[place], saved[index], sums)
        return {"rows": d_rows, **dict(zip(own, sums.result(), strict=True))}

    return run


def _check_equal(passes: dict[str, Pass]) -> None:
    """AssertionError unless all contestants compute the same gradients."""

    expected = passes["eager"]()
    for way, run in passes.items():
        for name, gradient in run().items():
            scale = float(expected[name].abs().max())
            error = float((gradient - expected[name]).abs().max())
            assert error <= 1e-4 * scale, f"{way}: gradient of {name} is off by {error:.1e} of {scale:.1e}"


def _peak(run: Pass) -> int:
    """The most bytes that a pass holds at one time beyond its input, without its result: gradients of weights and rows."""
    from ..memory.arena.tracer import StorageTracer

    results = sum(gradient.nbytes for gradient in run().values())
    with StorageTracer([]) as tracer:
        run()
    return max(0, tracer.peak_bytes - results)


def _processor_s(run: Pass) -> float:
    started = time.process_time()
    run()
    return time.process_time() - started


if __name__ == "__main__":
    raise SystemExit(main())
