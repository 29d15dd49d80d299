"""`python -m efflaunch.bench.predicted --json FILE`: the ledger's peak against exact live bytes of real steps.

Every memory preset, chunk sizes, segments, head groups, ranks, schemes, families, precisions and ways to reduce gradients; gloo
ranks on CPU, a traced warm step each (traced.py). Deterministic: no time is measured.

Headline keys: `worst_over` and `worst_under`, the largest shares by which a prediction is above or below what was measured.
"""

from __future__ import annotations

import argparse
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..model.adapters.config import AdapterConfig, AdapterMethod
from ..model.config import Family
from .ranks import on_fresh_ranks
from .record import machine, write_json
from .traced import Case, case_ledger, memory_config, predicted_by_phase, traced_peak

TARGETS = {"over": 0.03, "under": 0.01}
ALST = {"layer_input": "host", "chunk_tokens": 256}
STREAMBP = {"attention": "chunks", "chunk_tokens": 256}
MEMO = {"layer_input": "host", "attention_output": "host", "activations": "host"}
KEEP = {"attention_output": "keep", "activations": "keep"}
EXPERTS = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 192, "norm_topk_prob": True}
QWEN3_MOE = {"family": Family.QWEN3_MOE, "head_dim": 32, "extra": EXPERTS}
SMOLLM3 = {"family": Family.SMOLLM3, "extra": {"no_rope_layer_interval": 2}}
MIXTRAL = {"family": Family.MIXTRAL, "intermediate_size": 256, "extra": {"num_local_experts": 4, "num_experts_per_tok": 2}}
QWEN2_MOE = {"family": Family.QWEN2_MOE, "extra": {**EXPERTS, "num_experts_per_tok": 4, "shared_expert_intermediate_size": 384}}
TWO_KINDS_OVER = 0.10
"""The same where some layers are dense and others have experts: all are counted as the kind that holds more."""
# As published models have it: a dense layer is as wide as what a token visits of experts.
MIXED = {**QWEN3_MOE, "num_layers": 4, "intermediate_size": 384, "extra": {**EXPERTS, "mlp_only_layers": [1]}}
DOTS = {
    "family": Family.DOTS1, "head_dim": 32, "intermediate_size": 576,
    "extra": {
        "n_routed_experts": 8, "n_shared_experts": 1, "num_experts_per_tok": 2, "moe_intermediate_size": 192, "first_k_dense_replace": 1,
        "norm_topk_prob": True,
    },
}  # fmt: skip
MORE: dict[str, dict[str, Any]] = {
    "olmo2": {"family": Family.OLMO2},
    "granite": {"family": Family.GRANITE, "extra": {"logits_scaling": 8.0, "residual_multiplier": 0.5}},
    "glm4": {"family": Family.GLM4},
    "cohere2": {"family": Family.COHERE2, "sliding_window": 512},
    "stablelm": {"family": Family.STABLELM},
}
BY_FAMILY: dict[str, tuple[str, ...]] = {
    "olmo2": ("by 256", "streambp"),
    "granite": ("recompute", "by 256", "keep", "streambp"),
    "glm4": ("by 256", "streambp"),
    "cohere2": ("streambp",),
    "stablelm": ("recompute",),
}
HOW: dict[str, dict[str, Any]] = {"recompute": {}, "by 256": {"chunk_tokens": 256}, "keep": KEEP, "streambp": STREAMBP}
GEMMA = {"num_layers": 4, "head_dim": 32, "sliding_window": 512, "tie_embeddings": True}
LORA = AdapterConfig(name="lora", method=AdapterMethod.LORA, rank=8)
QLORA = replace(LORA, name="qlora", method=AdapterMethod.QLORA)
LORA_HEAD = replace(LORA, modules_to_save=["head", "norms"])
DORA = replace(LORA, dora=True)


def main(arguments: list[str] | None = None) -> int:
    options, origin = _parser().parse_args(arguments), machine()
    chosen = [case for case in CASES if options.only in case.name]
    rows: list[dict[str, Any]] = []
    for ranks in sorted({case.ranks for case in chosen}):
        rows += on_fresh_ranks(_rank_main, ranks, [case for case in chosen if case.ranks == ranks])["rows"]
    result = {"benchmark": "predicted", **origin, "targets": TARGETS, **summary(rows), "rows": rows}
    write_json(options.json, result)
    print(f"{len(rows)} configurations: at most {result['worst_over']:.2%} above, {result['worst_under']:.2%} below  -> {options.json}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m efflaunch.bench.predicted", description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--json", type=Path, required=True, help="where the result goes")
    parser.add_argument("--only", default="", help="configurations whose name contains this")
    return parser


def summary(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Headline figures: signed errors are predicted over measured, less 1."""
    errors = [row["predicted_bytes"] / row["measured_bytes"] - 1.0 for row in rows]
    return {
        "worst_over": max(0.0, *errors),
        "worst_under": max(0.0, *(-error for error in errors)),
        "mean_error": sum(map(abs, errors)) / len(errors),
    }


def _rank_main(rank: int, ranks: int, store: Path, cases: list[Case], results: Any) -> None:
    import torch.distributed as dist

    os.environ.update(RANK=str(rank), WORLD_SIZE=str(ranks), LOCAL_RANK=str(rank))
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=ranks)
    rows = [_measured(case) for case in cases]
    if rank == 0:
        results.put({"rows": rows})
    dist.barrier()
    dist.destroy_process_group()


def _measured(case: Case) -> dict[str, Any]:
    """Compare predicted and measured peaks of one case on a rank. Collective."""
    ledger = case_ledger(case)
    predicted = predicted_by_phase(case)
    phase = max(predicted, key=lambda phase: predicted[phase])
    return {
        "name": case.name,
        "ranks": case.ranks,
        "layout": f"Ulysses {ledger.layout.ulysses} x ring {ledger.layout.ring}",
        "tokens": case.tokens,
        "dtype": case.dtype,
        "phase": phase.value,
        "predicted_bytes": predicted[phase],
        "measured_bytes": traced_peak(case),
    }


def _case(name: str, memory: dict[str, Any] | None = None, **fields: Any) -> Case:
    model = {"vocab_size": 1024, **fields.pop("model", {})}
    return Case(name=name, memory=memory_config(**(memory or {})), model=model, **fields)


CASES: tuple[Case, ...] = (
    _case("recompute"),
    _case("recompute, 4096 tokens", tokens=4096),
    _case("recompute, few tokens", tokens=64),
    _case("recompute, large vocabulary", tokens=512, model={"vocab_size": 16384}),
    _case("recompute, bfloat16", dtype="bfloat16"),
    _case("recompute, float64", dtype="float64", tokens=512),
    _case("recompute, two micro-batches", micro_batches=2),
    _case("recompute, attention kept", {"attention_output": "keep"}),
    _case("recompute by 256", {"chunk_tokens": 256}, tokens=2048),
    _case("recompute by 300, attention kept", {"chunk_tokens": 300, "attention_output": "keep"}, tokens=2048),
    _case("recompute by 256, bfloat16", {"chunk_tokens": 256}, tokens=2048, dtype="bfloat16"),
    _case("recompute, segments of 2", {"segment_layers": 2}),
    _case("recompute, segments of 3 of 8 layers", {"segment_layers": 3, "chunk_tokens": 256}, model={"num_layers": 8}),
    _case("keep", KEEP),
    _case("keep, bfloat16", KEEP, dtype="bfloat16"),
    _case("keep, Ulysses 2", KEEP, ranks=2, scheme="ulysses"),
    _case("alst", ALST, tokens=2048),
    _case("alst, Ulysses 2", ALST, tokens=2048, ranks=2, scheme="ulysses"),
    _case("alst, bfloat16, segments of 2", {**ALST, "segment_layers": 2}, tokens=2048, dtype="bfloat16"),
    _case("streambp", STREAMBP, tokens=2048),
    _case("streambp, 8192 tokens", STREAMBP, tokens=8192, model={"num_layers": 2}),
    _case("streambp, bfloat16", STREAMBP, tokens=2048, dtype="bfloat16"),
    _case("streambp, Ulysses 2", STREAMBP, tokens=2048, ranks=2, scheme="ulysses"),
    _case("streambp, inputs on the host", {**STREAMBP, "layer_input": "host"}, tokens=2048),
    _case("streambp, attention stored, segments of 2", {**STREAMBP, "attention_output": "keep", "segment_layers": 2}, tokens=2048),
    _case("memo, all on the host", MEMO),
    _case("memo, half", {**MEMO, "host_fraction": 0.5}, tokens=2048),
    _case("memo, 0.3 by 256", {**MEMO, "host_fraction": 0.3, "chunk_tokens": 256}, tokens=2048),
    _case("upipe, 2 groups", {**ALST, "head_groups": 2}, tokens=2048),
    _case("upipe, 4 groups, Ulysses 2", {**ALST, "head_groups": 4}, tokens=2048, ranks=2, scheme="ulysses"),
    _case("recompute, Ulysses 2", ranks=2, scheme="ulysses"),
    _case("recompute, ring 2", ranks=2, scheme="ring"),
    _case("recompute by 256, Ulysses 4, 2 KV heads", {"chunk_tokens": 256}, ranks=4, scheme="ulysses"),
    _case("recompute, whole gradients", micro_batches=2, grad_reduce="step", ranks=2, scheme="ulysses", tokens=512),
    _case("recompute by 256, three documents", {"chunk_tokens": 256}, tokens=2048, documents=3),
    _case("recompute, attention kept, three documents", {"attention_output": "keep", "chunk_tokens": 300}, tokens=2048, documents=3),
    _case("streambp, three documents", STREAMBP, tokens=2048, documents=3),
    _case("alst, two documents, Ulysses 2", ALST, tokens=2048, ranks=2, scheme="ulysses", documents=2),
    _case("alst, two documents, ring 2", ALST, tokens=2048, ranks=2, scheme="ring", documents=2),
    _case("memo, half, two documents, Ulysses 2", {**MEMO, "host_fraction": 0.5}, ranks=2, scheme="ulysses", documents=2),
    _case("inputs on the host, two documents, segments of 2", {"layer_input": "host", "segment_layers": 2}, documents=2),
    _case("qwen3", model={"family": Family.QWEN3, "head_dim": 64}),
    _case("qwen2 by 256", {"chunk_tokens": 256}, model={"family": Family.QWEN2}, tokens=2048),
    _case("mistral, window 512", {"chunk_tokens": 256}, model={"family": Family.MISTRAL, "sliding_window": 512}, tokens=2048),
    _case("smollm3, a layer without rotation, by 256", {"chunk_tokens": 256}, model=SMOLLM3, tokens=2048),
    _case("qwen3 moe", model=QWEN3_MOE),
    _case("qwen3 moe, many tokens", model=QWEN3_MOE, tokens=4096),
    _case("qwen3 moe, bfloat16", model=QWEN3_MOE, dtype="bfloat16", tokens=4096),
    _case("qwen3 moe, keep", KEEP, model=QWEN3_MOE, tokens=4096),
    _case("qwen3 moe by 256, streambp", STREAMBP, model=QWEN3_MOE, tokens=4096),
    _case("mixtral, memo, half", {**MEMO, "host_fraction": 0.5}, model=MIXTRAL, tokens=2048),
    _case("mixtral by 256, segments of 2", {"chunk_tokens": 256, "segment_layers": 2}, model=MIXTRAL, dtype="bfloat16", tokens=2048),
    _case("qwen2 moe, everything kept by class", {**KEEP, "layer_input": "host"}, model=QWEN2_MOE),
    _case("qwen3 moe, a dense layer", model=MIXED),
    _case("qwen3 moe, a dense layer, keep", KEEP, model=MIXED, tokens=2048),
    _case("dots1", model=DOTS),
    _case("dots1 by 256, bfloat16", {"chunk_tokens": 256}, model=DOTS, dtype="bfloat16", tokens=2048),
    _case("qwen2 moe, Ulysses 2", model=QWEN2_MOE, ranks=2, scheme="ulysses"),
    _case("lora, recompute, bfloat16", dtype="bfloat16", adapter=LORA),
    _case("lora, recompute, attention kept", {"attention_output": "keep"}, adapter=LORA),
    _case("lora, keep", KEEP, adapter=LORA),
    _case("lora, streambp", STREAMBP, tokens=2048, adapter=LORA),
    _case("lora, memo, half", {**MEMO, "host_fraction": 0.5}, tokens=2048, adapter=LORA),
    _case("lora with a head of its own, alst, Ulysses 2, bfloat16", ALST, dtype="bfloat16", ranks=2, scheme="ulysses", adapter=LORA_HEAD),
    _case("lora, recompute, two micro-batches", micro_batches=2, adapter=LORA),
    *(_case(f"{name}, {how}", HOW[how], model=MORE[name], tokens=2048) for name, policies in BY_FAMILY.items() for how in policies),
    _case("cohere2, by 256, bfloat16", HOW["by 256"], model=MORE["cohere2"], tokens=2048, dtype="bfloat16"),
    _case("dora, recompute, bfloat16", dtype="bfloat16", adapter=DORA),
    _case("dora, keep", KEEP, adapter=DORA),
    _case("dora, streambp", STREAMBP, tokens=2048, adapter=DORA),
    _case("lora beside a fused matrix, by 256", HOW["by 256"], model=MORE["glm4"], tokens=2048, adapter=LORA),
    _case("qlora, recompute, bfloat16", dtype="bfloat16", adapter=QLORA),
    _case("qlora, keep", KEEP, adapter=QLORA),
    _case("qlora by 256, streambp, Ulysses 2", STREAMBP, dtype="bfloat16", ranks=2, scheme="ulysses", tokens=2048, adapter=QLORA),
    _case("gemma2", model={"family": Family.GEMMA2, **GEMMA}),
    _case("gemma3 by 256, streambp", STREAMBP, model={"family": Family.GEMMA3, **GEMMA}, tokens=2048),
)


if __name__ == "__main__":
    raise SystemExit(main())
