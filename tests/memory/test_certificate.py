"""What a certificate says, what it is compared with, and how a run tells."""

from __future__ import annotations

import functools
from dataclasses import asdict, replace

import pytest

from efflaunch.estimate.certificate import OUTSIDE, Check, bound_line, certify, check_line
from efflaunch.estimate.footprint.activations import graph_row
from efflaunch.estimate.footprint.device import TENSORS_PER_LAYER
from efflaunch.estimate.ledger import Ledger
from efflaunch.estimate.solver.report import describe_policy, describe_report
from efflaunch.launcher.config.compose import compose
from efflaunch.launcher.config.ledger import plan
from efflaunch.launcher.rundir.progress import RunProgress, certificate_line, start_line, summary_lines
from efflaunch.memory.config import AttentionTiling, MemoryConfig
from efflaunch.memory.policy import KEPT, MOVED, MemoryPolicy, Split
from efflaunch.utils.c_allocator import LARGE_BYTES

from .settings import GIB, cluster, make_ledger, policy

K = 1 << 10
AUTO = MemoryConfig(name="auto", solve=True)


@functools.cache
def solved() -> Ledger:
    return make_ledger(length=1 << 20, tokens_per_rank=128 * K, memory=AUTO)


def test_the_bound_is_the_ledgers_peak_and_what_tensors_show_is_compared():
    certificate = certify(solved())
    assert (certificate.device_bytes, certificate.device_capacity_bytes) == (solved().device.peak_bytes, 80 * GIB)
    assert certificate.fits and certificate.proof is not None and certificate.proof.startswith("no policy is faster")
    unseen = sum(term.num_bytes for term in solved().device.terms if term.name in OUTSIDE)
    assert certificate.comparable_bytes == solved().device.peak_bytes - unseen and certificate.compared == "held by the allocator"
    for name in OUTSIDE:
        assert any(text.startswith(name) for text in certificate.assumptions)


def test_without_a_gpu_the_whole_bound_is_compared_with_resident_memory():
    machines = cluster(device=type(cluster().device)("cpu"))
    ledger = make_ledger(length=64 * K, tokens_per_rank=8 * K, machines=machines)
    certificate = certify(ledger)
    mapped = {term.name: term.num_bytes // 8 for term in ledger.host.terms if term.name in ("checkpoint snapshots", "data staging")}
    assert len(mapped) == 2 and certificate.comparable_bytes == certificate.device_bytes + sum(mapped.values())
    assert certificate.compared == "resident, libraries in"
    assert certificate.proof is None


def test_without_a_gpu_the_bound_has_room_for_what_heaps_keep_of_freed_blocks():
    """In quickstart_lora, whose tensors are below 1 MiB, holes between blocks grew by 50 MiB in 14 steps; twice past a bound without it."""
    ledger = plan(compose(["+experiment=quickstart_lora"]))
    assert _reserve(ledger) == 4 * 1024 * graph_row(ledger.inputs) > 50 << 20, "no more than all tensors of all layers"
    assert certify(ledger).comparable_bytes > 1.014 * 682 * (1 << 20), "the most that was seen, over the bound that did not hold"
    assert any(text.startswith("allocator reserve: freed blocks") for text in certify(ledger).assumptions)
    longer = plan(compose(["+experiment=quickstart_lora", "parallel.tokens_per_rank=8K", "data.max_seq_len=16K",
                           "data.global_batch_tokens=16K", "model.max_positions=16K", "memory=recompute"]))  # fmt: skip
    assert _reserve(longer) == 4 * TENSORS_PER_LAYER * LARGE_BYTES == 80 << 20, "no more than blocks of that size can be"


def _reserve(ledger):
    return next(term.num_bytes for term in ledger.device.terms if term.name == "allocator reserve")


@pytest.mark.parametrize(("measured", "ok"), [((5, 9), True), ((5, 11), False)])
def test_a_measured_step(measured, ok):
    check = Check(predicted_bytes=10 * GIB, measured_bytes=tuple(size * GIB for size in measured), compared="held by the allocator")
    assert check.ok is ok
    line = check_line(check.predicted_bytes, check.measured_bytes, check.compared)
    expected = (
        "the memory certificate holds: 9.0 GiB held by the allocator, at most 10.0 GiB predicted"
        if ok
        else "the memory certificate does not hold: 11.0 GiB held by the allocator on rank 1, 1.0 GiB more than predicted; the run goes on"
    )
    assert line.startswith(expected)
    event = {"event": "certificate", "step": 1, "ok": check.ok, **asdict(check)}
    assert certificate_line(event) == line


def test_a_run_tells_policy_and_certificate_at_its_start_and_end():
    certificate = certify(solved())
    start = {"event": "start", "steps": 3, "world_size": 8, "parameters": 8_000_000, "memory": list(certificate.policy)}
    start |= {"certificate": asdict(certificate)}
    shown = start_line(start)
    assert f"memory: {'; '.join(certificate.policy)}" in shown and "checked after the first step" in shown
    assert bound_line(certificate).partition(" (")[0].split(" on each")[0] in shown.replace(" of 80.0 GiB", "")
    step = {"event": "step", "step": 1, "loss": 2.0, "step_s": 1.0, "total_tokens": 9, "ranks": [{"rank": 0, "peak_bytes": 5}]}
    check = Check(predicted_bytes=10, measured_bytes=(12,), compared="held by the allocator")
    checked = {"event": "certificate", "step": 1, "ok": False, **asdict(check)}
    rows = dict(summary_lines(RunProgress().apply([start, step, checked])))
    assert rows["memory"] == "; ".join(certificate.policy) and "does not hold" in rows["certificate"]


def test_what_does_not_fit_is_said_at_the_start():
    ledger = make_ledger(length=1 << 20, tokens_per_rank=128 * K, memory=policy(), machines=cluster(device_memory_bytes=76 * GIB))
    start = {
        "event": "start",
        "steps": 3,
        "world_size": 8,
        "parameters": 8_000_000,
        "memory": ["x"],
        "certificate": asdict(certify(ledger)),
    }
    assert not ledger.fits and "MORE THAN THERE IS" in start_line(start)


MIXED = MemoryPolicy(
    layer_input=Split(keep=0.25, host=0.75),
    attention_output=MOVED,
    query=KEPT,
    key_value=KEPT,
    residual=Split(),
    mlp=Split(host=0.38),
    segment_layers=2,
    chunk_tokens=16 * K,
    attention=AttentionTiling.CHUNKS,
)


@pytest.mark.parametrize(
    ("memory", "words"),
    [
        (MIXED, "inputs of every 2nd layer 25 % kept on the GPU, 75 % to the host; attention outputs to the host; "
         "queries, keys and values kept on the GPU; sums after attention recomputed; gate and up 38 % to the host, 62 % recomputed; "
         "chunks of 16K tokens, attention by chunks"),
        (MemoryPolicy(), "layer inputs kept on the GPU; attention runs again in backward; everything else recomputed; "
         "whole layers at a time"),
        (MemoryPolicy(graph=True), "every activation is kept on the GPU; no layer runs again"),
        (replace(MIXED, attention=AttentionTiling.WHOLE, head_groups=4, offload_dir="/local", chunk_tokens=None, segment_layers=1,
                 layer_input=MOVED),
         "layer inputs to files; attention outputs to files; queries, keys and values kept on the GPU; sums after attention recomputed; "
         "gate and up 38 % to files, 62 % recomputed; whole layers at a time, attention in 4 groups of heads"),
    ],
)  # fmt: skip
def test_a_policy_in_words(memory, words):
    assert "; ".join(describe_policy(memory, solved().inputs)) == words


def test_a_report_in_words():
    report = solved().report
    assert report is not None
    lines = describe_report(report)
    assert lines[0].startswith("no policy is faster") and any("against every activation kept" in line for line in lines)
    short = make_ledger(length=1 << 20, tokens_per_rank=128 * K, memory=AUTO, machines=cluster(device_memory_bytes=20 * GIB)).report
    assert short is not None
    lines = describe_report(short)
    assert lines[0].startswith("nothing fits") and any("whatever the policy: optimizer states" in line for line in lines)
    assert any(line.startswith("the least that works: cluster.device_memory_bytes=") for line in lines)
