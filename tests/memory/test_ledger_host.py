"""Host memory, streamed layers and times against numbers worked out by hand for Llama 8B (32 layers, width 4096, 8 KV heads of 128)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from efflaunch.estimate.footprint.activations import class_bytes, moved_by_class
from efflaunch.estimate.footprint.host import moved_bytes
from efflaunch.estimate.footprint.term import Phase
from efflaunch.estimate.ledger import Ledger
from efflaunch.estimate.timing.flops import class_recompute_flops, layer_backward_s, layer_forward_s, layer_recompute_s
from efflaunch.estimate.timing.offload import backward_stall_s, forward_stall_s, leaving_bytes, returning_bytes
from efflaunch.memory.config import ActivationPlace, AttentionTiling, MemoryConfig
from efflaunch.training.config import Dtype

from .settings import GIB, SMALL, cluster, make_ledger

M = 1 << 20
K = 1 << 10
ONE = {"num_nodes": 1, "ranks_per_node": 1}
HOSTED: dict[str, Any] = {
    "layer_input": ActivationPlace.HOST,
    "attention_output": ActivationPlace.RECOMPUTE,
    "activations": ActivationPlace.RECOMPUTE,
}
STREAMED: dict[str, Any] = {**HOSTED, "attention": AttentionTiling.CHUNKS, "chunk_tokens": 16 * K}


def one_gpu(tokens: int = M, **memory: Any) -> Ledger:
    return make_ledger(length=tokens, tokens_per_rank=tokens, machines=cluster(**ONE), memory=MemoryConfig(name="m", **memory))


def in_kib_a_token(ledger: Ledger, name: str, phase: Phase) -> float:
    (entry,) = [entry for entry in ledger.device.terms if entry.name == name]
    return entry.by_phase.get(phase, 0) / ledger.inputs.tokens / KIB


KIB = 1024


def test_what_a_token_of_each_class_takes() -> None:
    assert class_bytes(one_gpu(**HOSTED).inputs) == {
        "layer_input": 8 * KIB, "query": 8 * KIB, "key_value": 4 * KIB, "attention_output": 8 * KIB + 4 * 32, "residual": 8 * KIB,
        "mlp": 2 * 2 * 14336,
    }  # fmt: skip


def test_streaming_backward_takes_28_kib_a_token_and_20_with_inputs_on_the_host() -> None:
    """8 gradient + 4 K, V + 8 float32 dK, dV; and 8 of the live layer's input where it is kept."""
    for phase in (Phase.BACKWARD_MLP, Phase.BACKWARD_ATTENTION, Phase.BACKWARD_PROJECTIONS):
        assert in_kib_a_token(one_gpu(**STREAMED), "live layer, all rows", phase) == 20
    kept = one_gpu(**{**STREAMED, "layer_input": ActivationPlace.KEEP})
    assert in_kib_a_token(kept, "live layer, all rows", Phase.BACKWARD_MLP) == 20
    assert in_kib_a_token(kept, "layer inputs", Phase.FORWARD) == 32 * 8


def test_no_whole_length_input_is_on_the_device_where_inputs_wait_on_the_host() -> None:
    ledger = one_gpu(**STREAMED)
    assert "layer inputs" not in {entry.name for entry in ledger.device.terms}
    # The live piece's and two on their way, in the first layer, where gradients are largest.
    flight = next(entry for entry in ledger.device.terms if entry.name == "host copies in flight")
    assert flight.by_phase[Phase.BACKWARD_MLP] == 3 * 16 * K * 8 * KIB
    assert flight.by_phase[Phase.FORWARD] == GIB


@pytest.mark.parametrize(("segment", "tensors"), [(1, 32), (2, 17), (3, 13), (4, 11), (8, 11)])
def test_inputs_that_wait_on_the_host(segment: int, tensors: int) -> None:
    """ceil(32 / k) and the k - 1 inner ones of the live segment, 8 GiB each at 2^20 tokens."""
    ledger = one_gpu(**STREAMED, segment_layers=segment)
    assert moved_bytes(ledger.inputs) == tensors * 8 * GIB


@pytest.mark.parametrize(("segment", "gib"), [(1, 977), (2, 519), (4, 336)])
def test_four_million_tokens_over_eight_gpus(segment: int, gib: int) -> None:
    tokens = 500_000
    memory = MemoryConfig(name="m", **STREAMED, segment_layers=segment)
    ledger = make_ledger(length=8 * tokens, tokens_per_rank=tokens, memory=memory)
    (waiting,) = [entry for entry in ledger.host.terms if entry.name == "activations on the host"]
    assert 8 * moved_bytes(ledger.inputs) / GIB == pytest.approx(gib, abs=0.6)
    # The arena is opened with whole blocks of 64 KiB for each piece.
    assert 1.0 <= waiting.num_bytes / (8 * moved_bytes(ledger.inputs)) < 1.001


@pytest.mark.parametrize(("segment", "thousands"), [(1, 492), (2, 925), (3, 1210), (4, 1430)])
def test_longest_sequence_that_128_gib_of_host_hold(segment: int, thousands: int) -> None:
    """8 GiB are the system's; no optimizer states."""
    per_token = moved_bytes(one_gpu(tokens=M, **STREAMED, segment_layers=segment).inputs) / M
    assert (128 - 8) * GIB / per_token == pytest.approx(thousands * 1000, rel=0.001)


def test_files_are_an_account_of_their_own() -> None:
    ledger = one_gpu(**STREAMED, offload_dir="/scratch")
    assert ledger.file_bytes == 256 * GIB
    assert "activations on the host" not in {entry.name for entry in ledger.host.terms}
    assert any("/scratch" in text for text in ledger.timing.assumptions)


def test_a_share_of_the_tokens_moves_with_memo() -> None:
    memo = {"layer_input": ActivationPlace.HOST, "attention_output": ActivationPlace.HOST, "activations": ActivationPlace.HOST}
    moved = moved_by_class(one_gpu(tokens=K, **memo, host_fraction=0.25).inputs)
    whole = moved_by_class(one_gpu(tokens=K, **memo, host_fraction=1.0).inputs)
    assert moved["layer_input"] == whole["layer_input"] and moved["attention_output"] == whole["attention_output"]
    assert all(4 * moved[name] == whole[name] for name in ("query", "key_value", "residual", "mlp"))


def test_the_host_budget_limits_what_waits() -> None:
    ledger = one_gpu(**STREAMED, host_budget=200 * GIB)
    assert ledger.budget is not None and not ledger.budget.fits and not ledger.fits
    assert one_gpu(**STREAMED, host_budget=300 * GIB).budget.fits  # type: ignore[union-attr]


@pytest.mark.parametrize(("tokens", "segment", "minutes"), [(1 << 19, 1, 18), (1 << 20, 1, 69), (1 << 20, 4, 80), (1 << 21, 1, 268)])
def test_minutes_of_a_step_on_one_gpu(tokens: int, segment: int, minutes: float) -> None:
    """(4.5 + (k-1)/k) 2 d L S^2 + (8 + 2 (k-1)/k) weights x S at 330 TFLOP/s; we leave each layer's last product out of recomputation."""
    machine = cluster(**ONE, peak_flops=330e12, gemm_efficiency=1.0, attention_efficiency=1.0)
    memory = MemoryConfig(name="m", **STREAMED, segment_layers=segment)
    timing = make_ledger(length=tokens, tokens_per_rank=tokens, machines=machine, memory=memory).timing
    assert timing.step_s / 60 == pytest.approx(minutes, rel=0.03)
    assert timing.host_s == 0.0, "0.17 s of copies hide behind 19 s of a layer"


def test_a_layer_input_leaves_in_a_sixth_of_a_second() -> None:
    s = one_gpu(**STREAMED).inputs
    assert leaving_bytes(s) == 8 * GIB
    assert leaving_bytes(s) / s.cluster.host_link_bandwidth == pytest.approx(0.17, abs=0.005)
    assert returning_bytes(s) == 16 * GIB, "once for all keys, once with its chunk"
    assert forward_stall_s(s) == backward_stall_s(s) == 0.0


def test_short_sequences_wait_for_the_link() -> None:
    """A layer's forward of 1K tokens is over long before its input is gone at 1 GB/s."""
    machine = cluster(**ONE, host_link_bandwidth=1e9)
    ledger = make_ledger(length=K, tokens_per_rank=K, machines=machine, memory=MemoryConfig(name="m", **HOSTED))
    s = ledger.inputs
    assert forward_stall_s(s) == pytest.approx(8 * KIB * K / 1e9 - layer_forward_s(s))
    assert backward_stall_s(s) == pytest.approx(max(0.0, 8 * KIB * K / 1e9 - layer_backward_s(s) - layer_recompute_s(s)))
    assert ledger.timing.host_s == pytest.approx(32 * (forward_stall_s(s) + backward_stall_s(s)))
    assert ledger.timing.step_s > make_ledger(length=K, tokens_per_rank=K, machines=machine).timing.step_s


def test_recomputing_a_class_costs_its_products() -> None:
    costs = class_recompute_flops(one_gpu(**HOSTED).inputs)
    assert costs["query"] == costs["residual"] == 2 * 4096 * 4096
    assert costs["key_value"] == 4 * 4096 * 1024
    assert costs["mlp"] == 4 * 4096 * 14336
    assert costs["attention_output"] == 2 * 4096 * M  # half of 4 d a key, for S keys
    assert costs["layer_input"] == costs["attention_output"] + 2 * 218_112_000


def test_a_share_recomputed_costs_that_share() -> None:
    memo = {"layer_input": ActivationPlace.HOST, "attention_output": ActivationPlace.HOST, "activations": ActivationPlace.HOST}
    costs = [layer_recompute_s(one_gpu(**memo, host_fraction=share).inputs) for share in (0.0, 0.5, 1.0)]
    assert costs[1] == pytest.approx(costs[0] / 2) and costs[2] == 0.0


def test_what_stays_of_other_classes_is_kept_in_every_layer() -> None:
    from efflaunch.estimate.footprint.device import device_terms
    from efflaunch.memory.policy import Split

    s = one_gpu(**{**HOSTED, "layer_input": ActivationPlace.KEEP}).inputs
    s = replace(s, policy=replace(s.policy, mlp=Split(keep=0.25), key_value=Split(keep=1.0)))
    (kept,) = [entry for entry in device_terms(s) if entry.name == "activations kept"]
    assert kept.by_phase[Phase.LOSS] == 32 * (M // 4 * 4 * 14336 + M * 4 * KIB)


def test_on_a_cpu_nothing_leaves_late() -> None:
    from efflaunch.cluster.config import Device

    machine = cluster(**ONE, device=Device.CPU)
    memory = MemoryConfig(name="m", **HOSTED)
    ledger = make_ledger(SMALL, length=K, tokens_per_rank=K, machines=machine, memory=memory, dtype=Dtype.FLOAT32)
    flight = next(entry for entry in ledger.device.terms if entry.name == "host copies in flight")
    assert Phase.FORWARD not in flight.by_phase
