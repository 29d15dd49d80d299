"""Terms, work and time against numbers worked out by hand, and the ledger's own sums."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest

from efflaunch.estimate.footprint.device import communicators
from efflaunch.estimate.footprint.term import ALL, Phase
from efflaunch.estimate.ledger import Account, Ledger
from efflaunch.estimate.plan_inputs import PlanInputs
from efflaunch.estimate.timing.flops import causal_pairs
from efflaunch.launcher.config.compose import compose
from efflaunch.model.config import Family
from efflaunch.parallel.config import GradReduce, Scheme
from efflaunch.training.config import Dtype

from .settings import GIB, LLAMA_8B, SMALL, cluster, make_ledger, policy

M = 1 << 20
K = 1 << 10
PARAMETERS = 8_030_261_248  # published
AT_PEAK = cluster(peak_flops=331e12, gemm_efficiency=1.0, attention_efficiency=1.0)


def in_gib(ledger: Ledger, name: str, phase: Phase | None = None) -> float:
    (entry,) = [entry for entry in ledger.device.terms if entry.name == name]
    return (entry.num_bytes if phase is None else entry.by_phase.get(phase, 0)) / GIB


def names(account: Account) -> set[str]:
    return {entry.name for entry in account.terms}


def test_a_million_tokens_of_llama_8b_on_eight_gpus() -> None:
    """32 layer inputs are 256 KiB a token; 16 bytes of weight, moments and gradient per parameter are shared by eight."""
    ledger = make_ledger(length=M, tokens_per_rank=128 * K, batch=4 * M)
    assert in_gib(ledger, "layer inputs") == 256 * K * 128 * K / GIB == 32
    assert in_gib(ledger, "weights") == pytest.approx(4 * PARAMETERS / 8 / GIB, rel=1e-9)
    assert in_gib(ledger, "optimizer states") == pytest.approx(8 * PARAMETERS / 8 / GIB, rel=1e-9)
    assert in_gib(ledger, "gradients") == pytest.approx(4 * PARAMETERS / 8 / GIB, rel=1e-9)
    layer = 218_112_000
    assert in_gib(ledger, "layers, gathered") == pytest.approx(2 * 2 * layer / GIB, rel=1e-9)
    assert in_gib(ledger, "embedding and head, gathered") == pytest.approx(2 * (2 * 128256 * 4096 + 4096) / GIB, rel=1e-9)
    # Logits in bfloat16 and float32, and a chunk's hidden vectors through the norm.
    assert in_gib(ledger, "loss chunk") == pytest.approx((6 * 128256 + 10 * 4096) * 2048 / GIB, rel=1e-9)
    # Feed-forward of the live layer: gate, up, activation, the product's gradient and its factors', 12 f; sum and output beside them.
    assert in_gib(ledger, "live layer, a piece", Phase.BACKWARD_MLP) == (12 * 14336 + 2 * 2 * 4096) * 128 * K / GIB
    assert "gradients, whole" not in names(ledger.device) and "attention outputs kept" not in names(ledger.device)


def test_kept_attention_outputs_cost_a_query_width_and_a_float_per_head() -> None:
    ledger = make_ledger(length=M, tokens_per_rank=128 * K, memory=policy("recompute", "keep"))
    assert in_gib(ledger, "attention outputs kept") == 32 * (2 * 4096 + 4 * 32) * 128 * K / GIB


def test_gradients_kept_whole_are_four_bytes_a_parameter() -> None:
    ledger = make_ledger(length=8 * K, tokens_per_rank=8 * K, batch=M, grad_reduce=GradReduce.STEP)
    assert ledger.layout.num_micro_batches == 16
    assert in_gib(ledger, "gradients, whole") == pytest.approx(4 * PARAMETERS / GIB, rel=1e-9)


def test_auto_reduces_once_a_step_only_where_whole_gradients_fit() -> None:
    roomy = make_ledger(length=8 * K, tokens_per_rank=8 * K, batch=M)
    tight = make_ledger(length=8 * K, tokens_per_rank=8 * K, batch=M, machines=cluster(device_memory_bytes=50 * GIB))
    assert roomy.inputs.parallel.grad_reduce is GradReduce.STEP and roomy.fits
    assert tight.inputs.parallel.grad_reduce is GradReduce.MICRO_BATCH and tight.fits


@pytest.mark.parametrize(("ulysses", "copies"), [(2, 1), (8, 1), (16, 2), (32, 4)])
def test_key_value_heads_are_copied_where_ranks_outnumber_them(ulysses: int, copies: int) -> None:
    ledger = make_ledger(
        length=32 * K, tokens_per_rank=32 * K // ulysses, machines=cluster(num_nodes=4), scheme=Scheme.ULYSSES, sp_degree=ulysses
    )
    assert ledger.inputs.kv_copies == copies
    # Query-sized: the layer's gradient; output and its gradient on both sides; queries, their gradient and that of two documents;
    # four of the kernel's own. Keys and values, and twice their gradients.
    per_token = 12 * 2 * 4096 + 4 * 32 + 3 * 2 * copies * 2 * 1024
    assert in_gib(ledger, "live layer, all rows", Phase.BACKWARD_ATTENTION) == per_token * (32 * K // ulysses) / GIB


def test_the_peak_is_the_largest_phase_not_the_sum_of_largest_terms() -> None:
    ledger = make_ledger(length=128 * K, tokens_per_rank=16 * K)
    device = ledger.device
    by_hand = {phase: sum(entry.by_phase.get(phase, 0) for entry in device.terms) for phase in ALL}
    assert device.peak_bytes == max(by_hand.values()) == by_hand[device.peak_phase]
    assert device.peak_bytes < sum(entry.num_bytes for entry in device.terms)
    assert device.largest.by_phase[device.peak_phase] == max(entry.by_phase.get(device.peak_phase, 0) for entry in device.terms)


def test_ranks_of_a_machine_without_gpus_live_in_its_memory() -> None:
    from efflaunch.cluster.config import Device

    machine = cluster(device=Device.CPU, ranks_per_node=4, device_memory_bytes=GIB, host_memory_bytes=3 * GIB)
    ledger = make_ledger(SMALL, length=K, tokens_per_rank=K, machines=machine, dtype=Dtype.FLOAT32)
    (ranks,) = [entry for entry in ledger.host.terms if entry.name == "ranks"]
    assert ranks.num_bytes == 4 * ledger.device.peak_bytes
    assert ledger.device.fits and not ledger.host.fits and not ledger.fits


@pytest.mark.parametrize(
    ("tokens", "window", "pairs"), [(10, None, 50.0), (10, 10, 50.0), (10, 100, 50.0), (10, 4, 4 * 8.0), (1 << 20, None, 2.0**39)]
)
def test_causal_pairs(tokens: int, window: int | None, pairs: float) -> None:
    assert causal_pairs(tokens, window) == pairs


def test_windowed_pairs_approach_a_count_one_by_one() -> None:
    counted = sum(min(i + 1, 64) for i in range(4096))
    assert causal_pairs(4096, 64) == pytest.approx(counted, rel=0.01)


DOWN = 2 * 4096 * 14336
PASSES = [
    (policy(), 4.5, 8),
    (policy("recompute", "keep"), 3.5, 8),
    (policy("keep", "keep"), 3.5, 6),
]
"""Recomputation leaves the layer's last product out: its values are not needed."""


@pytest.mark.parametrize(("memory", "attention", "linear"), PASSES, ids=["recompute", "attention kept", "keep"])
def test_work_of_a_step(memory: Any, attention: float, linear: int) -> None:
    """attention passes x 2 d L S^2, as for one full sequence; linear x weights x S, the head never recomputed."""
    timing = make_ledger(length=M, tokens_per_rank=128 * K, memory=memory).timing
    assert timing.attention_flops == pytest.approx(attention * 2 * 4096 * 32 * float(M) ** 2, rel=1e-12)
    head = 128256 * 4096
    layers = 32 * 218_112_000
    left_out = 32 * (DOWN + 2 * 2 * 4096) * (linear == 8)  # and the norms, which are no products
    assert timing.linear_flops == pytest.approx((linear * layers - left_out + 6 * head) * M, rel=1e-12)
    assert timing.model_flops == pytest.approx(3.5 * 2 * 4096 * 32 * float(M) ** 2 + 6 * (layers + head) * M, rel=1e-12)


def test_time_of_a_million_tokens_agrees_with_the_published_run() -> None:
    """A public recipe trains Llama 8B on 1.1M tokens on 8 H100 in 564 s, about 331 TFLOP/s of causal work each."""
    timing = make_ledger(length=1_100_000, tokens_per_rank=137_500, machines=AT_PEAK).timing
    assert timing.compute_s == pytest.approx(564, rel=0.03)
    assert timing.tokens_per_s == pytest.approx(1_100_000 / timing.step_s)


def test_the_busiest_group_sets_the_pace() -> None:
    two, three = (
        make_ledger(length=8 * K, tokens_per_rank=8 * K, batch=n * 8 * K, machines=cluster(ranks_per_node=2)).timing for n in (2, 3)
    )
    assert three.compute_s == pytest.approx(2 * two.compute_s)
    assert three.flops == pytest.approx(1.5 * two.flops)


def test_exchanges_across_nodes_cost_more() -> None:
    inside = make_ledger(length=M, tokens_per_rank=64 * K, machines=cluster(ranks_per_node=16)).timing
    across = make_ledger(length=M, tokens_per_rank=64 * K, scheme=Scheme.ULYSSES, machines=cluster(num_nodes=2)).timing
    # One layer passes q, k, v and o of 64K tokens three times, 15/16 of it to others; KV heads are doubled on 16 ranks.
    sent = 32 * 2 * 64 * K * 3 * (4096 + 2 * 2 * 1024 + 4096)
    assert inside.sequence_s == pytest.approx(sent * 15 / 16 / 450e9)
    assert across.sequence_s == pytest.approx(sent * (7 / 16 / 450e9 + 8 / 16 / 50e9))


def test_short_steps_show_what_they_cannot_hide() -> None:
    timing = make_ledger(length=64, tokens_per_rank=64, batch=64 * 16, machines=cluster(num_nodes=2)).timing
    gathers, scatter = 4 * PARAMETERS, 4 * PARAMETERS
    # Eight links of 50 GB/s a node work side by side, as the rings of a collective do.
    assert timing.sharding_s == pytest.approx((gathers + scatter) * 15 / 16 / 400e9 - timing.compute_s, rel=1e-6)


def test_sliding_windows_save_work() -> None:
    mistral = {**LLAMA_8B, "family": Family.MISTRAL}
    full = make_ledger(mistral, length=M, tokens_per_rank=128 * K).timing
    windowed = make_ledger({**mistral, "sliding_window": 4096}, length=M, tokens_per_rank=128 * K).timing
    assert windowed.attention_flops / full.attention_flops == pytest.approx(2 * 4096 / M, rel=0.01)
    assert windowed.linear_flops == full.linear_flops


def test_nothing_heavy_is_imported() -> None:
    heavy = ("torch", "transformers", "numpy", "hydra", "efflaunch.launcher.config")
    code = f"import sys, efflaunch.estimate.suggestions; print([m for m in {heavy!r} if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("words", "groups"),
    [
        ((), 3),
        (("parallel.scheme=hybrid", "parallel.ulysses_degree=4"), 4),  # blocks of 8 and of 4
        (("parallel.sequence=adaptive",), 5),  # of 8, 4 and 2
        (("parallel.sp_degree=1", "data.max_seq_len=64K"), 2),
        (("parallel.replicate=2",), 4),
        (("parallel.replicate=8", "parallel.sp_degree=1", "data.max_seq_len=64K"), 2),
        (("parallel.pipeline.stages=2", "parallel.sp_degree=4", "data.max_seq_len=256K"), 8),
        (("cluster.ranks_per_node=1", "parallel.sp_degree=1", "data.max_seq_len=64K"), 0),
    ],
)
def test_communicators_are_those_that_plans_can_use(words: tuple[str, ...], groups: int) -> None:
    """256 MiB each: the run, its mesh, and the blocks of the sizes that plans have; stages have a group, and four between them."""
    config = compose(
        ["model=llama3_8b", "data=stdlib", "data.max_seq_len=512K", "data.global_batch_tokens=8M", "cluster=h100_80g_8", "memory=recompute",
         "parallel.sequence=static", "parallel.tokens_per_rank=64K", "train.steps=1", *words]
    )  # fmt: skip
    assert communicators(PlanInputs.of(config)).num_bytes == groups * GIB // 4
