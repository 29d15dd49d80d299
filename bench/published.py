"""`python -m efflaunch.bench.published --json FILE`: published runs of other systems beside what we plan for them under their own policy.

Each run is planned as its authors ran it: the same model, GPUs, tokens, attention kernel, and everything recomputed as they do, not as we
would. So the rows judge our cost model and ledger, not a contest. Nothing is trained and no torch is loaded; a few seconds in all.

Headline keys: `median_time_error`, `worst_time_error`, `median_memory_error`, `worst_memory_error`: shares by which predictions differ
from what was published, of the runs whose figures their authors stand by; `median_time_error_drafts` and `worst_time_error_drafts` of the
others. `limits`: runs of which is published that they ran on these GPUs, and at most a share of the peak (`mfu`); `limits_that_fit` is
how many of them our ledger has room for, and they are in no error. `left_out` says what a source does not tell. No figure of ours
is fitted to a row: kernels run at their published rates (cluster/attention_rates.py), products at the cluster's gemm_efficiency.
"""

from __future__ import annotations

import argparse
import statistics
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..estimate.build import build_ledger
from ..estimate.ledger import Ledger
from ..estimate.plan_inputs import PlanInputs
from ..launcher.config.compose import compose
from .record import machine, write_json

AIMS = {"median": 0.10, "worst": 0.25}
GB = 1e9
STATE_BYTES = 16
"""Of one weight in float32: itself, its gradient and two moments."""
RECOMPUTE = (
    "memory=alst", "memory.chunk_tokens=null", "parallel.scheme=ring", "train.dtype=bfloat16",
)  # fmt: skip
"""Layer inputs on the host, everything else recomputed, feed-forwards of all rows at once; keys and values travel in a ring."""
STATES = ("parallel.scheme=ulysses", "train.dtype=bfloat16", "optim.state_device=host")
TILED = ("memory=alst", *STATES)
"""The same with feed-forwards in tiles, Ulysses, and optimizer states on the host."""
WHOLE = ("memory=recompute", *STATES)
"""Layer inputs on the GPU, feed-forwards of all rows at once."""
TRL = "https://github.com/huggingface/trl/pull/6846"
TRL_DRAFT = "https://github.com/huggingface/trl/pull/6845"
FALLBACK = "https://github.com/huggingface/transformers/pull/48324"
ALST = "https://arxiv.org/abs/2506.13996"
ARCTIC = "https://github.com/snowflakedb/ArcticTraining"
UNSAID_ARCTIC = "seconds a step, whether GB are allocated or reserved"
UNSAID_TRL = "precision of weights and states, whether feed-forwards are tiled, whether GB are allocated or reserved"
UNSAID_ALST = "memory in GB; lengths are rounded in the paper (3.8M and 15.5M in its recipes)"


@dataclass(frozen=True, kw_only=True, slots=True)
class Published:
    """One published run, and how we are to plan it."""

    name: str
    source: str
    model: str
    """Our preset, and the authors' model."""
    gpus: int
    sequence_tokens: int
    step_s: float | None
    """Seconds of a step; None: not published."""
    memory_bytes: float | None
    """Of one GPU; None: not published."""
    words: tuple[str, ...]
    """Configuration of the peer's policy."""
    kernel: str
    """What attention ran, as far as the source says: a name of cluster/attention_rates.py."""
    cluster: str = "h100_80g_8"
    """Our preset of its GPUs."""
    num_sequences: int = 1
    """Sequences of a step."""
    left_out: str
    """What the source does not say."""
    mfu: float | None = None
    """Share of the peak, for runs of which no seconds are published; authors differ in which pairs of attention they count."""
    is_draft: bool = False
    """From a draft whose author corrected the series later: shown, and in no summary."""


def _trl(name: str, model: str, step_s: float, memory_gb: float | None, **more: Any) -> Published:
    fields = {"source": TRL_DRAFT, "gpus": 8, "sequence_tokens": 1 << 20, "is_draft": True, **more}
    memory = None if memory_gb is None else memory_gb * GB
    return Published(
        name=name, model=model, step_s=step_s, memory_bytes=memory, words=RECOMPUTE, left_out=UNSAID_TRL, **{"kernel": "cudnn", **fields}
    )  # fmt: skip


def _alst(name: str, gpus: int, tokens: int, step_s: float, words: tuple[str, ...] = TILED, num_sequences: int = 1) -> Published:
    return Published(
        name=f"Llama-3.1-8B, {name}, ALST", source=ALST, model="llama3_8b", gpus=gpus, sequence_tokens=tokens, step_s=step_s,
        memory_bytes=None, words=words, kernel="fa2", left_out=UNSAID_ALST, num_sequences=num_sequences,
    )  # fmt: skip


RUNS = (
    _trl("Qwen3-8B, 1M, TRL", "qwen3_8b", 380.0, 56.2, source=TRL, is_draft=False),
    _trl("Qwen3-8B, 1M, TRL, cuDNN missing", "qwen3_8b", 606.0, 56.2, source=FALLBACK, is_draft=False, kernel="sdpa"),
    _trl("Qwen3-32B, 1M, TRL", "qwen3_32b", 1295.0, 60.8),
    _trl("Qwen3-30B-A3B, 1M, TRL", "qwen3_30b_a3b", 483.0, 46.0),
    _trl("Qwen3-8B, 2M, TRL", "qwen3_8b", 696.0, None, gpus=16, sequence_tokens=1 << 21),
    _trl("Qwen3-8B, 4M, TRL", "qwen3_8b", 1346.0, None, gpus=32, sequence_tokens=1 << 22),
    _alst("160K a GPU", 8, 160_000, 123.0, WHOLE, 8),
    _alst("500K on one", 1, 500_000, 1010.0),
    _alst("1.1M", 8, 1_100_000, 564.0, WHOLE),
    _alst("1.2M", 8, 1_200_000, 703.0, (*WHOLE, "memory.chunk_tokens=16K")),
    _alst("2.4M", 8, 2_400_000, 2610.0, (*TILED, "memory.chunk_tokens=null")),
    _alst("3.8M", 8, 3_800_000, 6455.0),
    _alst("15.5M", 32, 15_500_000, 26709.0),
    Published(
        name="Llama-3.1-8B, 1.2M on one H200, ALST", source=ARCTIC, model="llama3_8b", gpus=1, sequence_tokens=1_200_000, step_s=None,
        memory_bytes=136 * GB, words=TILED, kernel="fa3", left_out=UNSAID_ARCTIC, cluster="h200_141g_8",
    ),
)
"""H100 SXM 80 GB, eight a node, but for the last; one sequence a step, but for the first of ALST's rows: one a GPU."""

CHUNKS_ON_HOST = (
    "memory=streambp", "memory.layer_input=host", "parallel.scheme=ulysses", "train.dtype=bfloat16", "optim.state_device=host",
)  # fmt: skip
"""Chunks of queries with layer inputs and optimizer states on the host."""
UNSAID_FPDT = "seconds and GB; its keys and values are on the host by chunks, ours on the GPU; the share is over 55 %, of which FLOPs"
MEMO = Published(
    name="7B, 1M, MEMO", source="https://arxiv.org/abs/2407.12117", model="llama3_8b", gpus=8, sequence_tokens=1 << 20, step_s=None,
    memory_bytes=None, kernel="fa2", cluster="a100_80g_8", mfu=0.523,
    words=("memory=memo", "parallel.scheme=ulysses", "train.dtype=bfloat16", "model.num_kv_heads=32", "model.intermediate_size=11008",
           "model.vocab_size=50304"),
    left_out="seconds and GB (abstract only); a GPT, planned as a Llama of its size without shared heads; its A800 have slower NVLink "
    "than our A100; which FLOPs the share counts",
)  # fmt: skip
STREAMBP = Published(
    name="Qwen3-8B, LoRA, 142.4K, StreamBP", source="https://arxiv.org/abs/2506.03077", model="qwen3_8b", gpus=1, sequence_tokens=142_400,
    step_s=None, memory_bytes=None, kernel="sdpa", cluster="a100_80g_8",
    words=("memory=streambp", "memory.chunk_tokens=500", "adapter=lora", "adapter.rank=32", "parallel.scheme=ulysses",
           "train.dtype=bfloat16", "train.loss_chunk_tokens=100"),
    left_out="GB at this length, which is the longest that ran on an A800 of 80 GB; a dense mask keeps its attention off flash kernels. "
    "Its full fine-tuning has moments in bfloat16 and its seconds no optimizer, which no plan of ours has",
)  # fmt: skip
LIMITS = (
    MEMO,
    STREAMBP,
    Published(
        name="Llama-8B, 2M on four of 40 GB, Ulysses-Offload", source="https://arxiv.org/abs/2408.16978", model="llama3_8b", gpus=4,
        sequence_tokens=1 << 21, step_s=None, memory_bytes=None, words=CHUNKS_ON_HOST, kernel="fa2", cluster="a100_40g_8x8", mfu=0.55,
        left_out=UNSAID_FPDT,
    ),
    Published(
        name="Llama-70B, 4M, Ulysses-Offload", source="https://arxiv.org/abs/2408.16978", model="llama3_70b", gpus=32,
        sequence_tokens=1 << 22, step_s=None, memory_bytes=None, words=CHUNKS_ON_HOST, kernel="fa2", cluster="a100_80g_8", mfu=0.55,
        left_out=UNSAID_FPDT,
    ),
)  # fmt: skip
"""Runs of which is known that they fitted; A100 (A800) 80 GB but where 40 is said."""


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m efflaunch.bench.published", description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--json", type=Path, required=True, help="where the result goes")
    parser.add_argument("--only", default="", help="runs whose name contains this")
    options = parser.parse_args(arguments)
    origin = machine()
    chosen = [row(run) for run in RUNS if options.only in run.name]
    limits = [limit_row(run) for run in LIMITS if options.only in run.name]
    if not chosen and not limits:
        parser.error(f"no run is called {options.only!r}: {', '.join(run.name for run in (*RUNS, *LIMITS))}")
    fitting = sum(each["fits"] for each in limits)
    figures = {"aims": AIMS, **summary(chosen), "limits_that_fit": fitting, "rows": chosen, "limits": limits}
    write_json(options.json, {"benchmark": "published", **origin, **figures})
    for each in chosen:
        if each["step_s"] is not None:
            print(f"{each['name']}: predicted {each['predicted_s']:,.0f} s, published {each['step_s']:,.0f} s ({each['time_error']:+.1%})")
    print(f"-> {options.json}")
    return 0


def configuration(run: Published, *more: str) -> list[str]:
    """The words that plan one run."""
    nodes = -(-run.gpus // 8)
    return [
        f"model={run.model}", f"model.max_positions={run.sequence_tokens}", "model.rope_scaling=null", "data=indexed",
        "data.prefixes=[corpus]", f"data.max_seq_len={run.sequence_tokens}",
        f"data.global_batch_tokens={run.sequence_tokens * run.num_sequences}",
        f"cluster={run.cluster}", f"cluster.num_nodes={nodes}", f"cluster.ranks_per_node={run.gpus // nodes}",
        f"parallel.tokens_per_rank={-(-run.sequence_tokens * run.num_sequences // run.gpus)}", "train.steps=1", *run.words, *more,
    ]  # fmt: skip


def row(run: Published) -> dict[str, Any]:
    """The figures of one run, published and predicted, and how far apart they are: predicted over published, less 1."""
    ledger = planned(run)
    timing, peak = ledger.timing, ledger.device.peak_bytes
    return {
        **asdict(run),
        "words": configuration(run),
        "predicted_s": timing.step_s,
        "predicted_bytes": peak,
        "time_error": None if run.step_s is None else timing.step_s / run.step_s - 1.0,
        "tiled_bytes": planned(run, "memory.chunk_tokens=16K").device.peak_bytes,
        "state_bytes": STATE_BYTES * ledger.inputs.parameters / run.gpus,
        "memory_error": None if run.memory_bytes is None else peak / run.memory_bytes - 1.0,
        # Causal work and none of it twice, over the GPUs' peak: what both times come to.
        "published_utilisation": timing.model_flops / (run.step_s * run.gpus * ledger.inputs.cluster.peak_flops) if run.step_s else None,
        "attention_share": timing.attention_flops / timing.flops,
        "forward_flops": ledger.inputs.attention_rate.forward,
        "backward_flops": ledger.inputs.attention_rate.backward,
        "gemm_efficiency": ledger.inputs.cluster.gemm_efficiency,
    }


def limit_row(run: Published) -> dict[str, Any]:
    """A run of which is published that it fitted: whether our ledger has room for it, and the share of the peak that we predict."""
    ledger = planned(run)
    timing, cluster = ledger.timing, ledger.inputs.cluster
    return {
        **asdict(run),
        "words": configuration(run),
        "predicted_bytes": ledger.device.peak_bytes,
        "device_bytes": ledger.device.capacity_bytes,
        "fits": ledger.device.fits,
        "predicted_s": timing.step_s,
        "predicted_utilisation": timing.model_flops / (timing.step_s * run.gpus * cluster.peak_flops),
    }


def planned(run: Published, *more: str) -> Ledger:
    """The ledger of a run with its own kernel."""
    return build_ledger(PlanInputs.of(compose(configuration(run, f"parallel.attention_kernel={run.kernel}", *more))))


def summary(rows: list[dict[str, Any]]) -> dict[str, float | None]:
    """Median and worst error of time and of memory, over the runs that are no drafts, and of the drafts' times; None without any."""
    found: dict[str, float | None] = {}
    for what, is_draft in (("time", False), ("memory", False), ("time", True)):
        errors = [abs(each[f"{what}_error"]) for each in rows if each[f"{what}_error"] is not None and each["is_draft"] == is_draft]
        of_drafts = "_drafts" * is_draft
        found[f"median_{what}_error{of_drafts}"] = statistics.median(errors) if errors else None
        found[f"worst_{what}_error{of_drafts}"] = max(errors, default=None)
    return found


if __name__ == "__main__":
    raise SystemExit(main())
