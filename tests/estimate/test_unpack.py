"""Time to unpack NF4: each piece of rows, as often as its products are made."""

from __future__ import annotations

from dataclasses import replace

import pytest

from efflaunch.estimate.plan_inputs import PlanInputs
from efflaunch.estimate.timing.step import estimate_time
from efflaunch.estimate.timing.unpack import TOUCHED_BYTES, norms_s, unpack_s, unpacked_times
from efflaunch.launcher.config.compose import compose


def inputs(*overrides: str) -> PlanInputs:
    return PlanInputs.of(compose(["+experiment=llama8b_lora_1M_1gpu", "memory=keep", "data.prefixes=[somewhere]", *overrides]))


def test_every_pass_unpacks_every_matrix_once_for_each_piece() -> None:
    s = inputs("adapter=qlora")
    numbers = 32 * s.packed_layer_parameters
    assert numbers == 32 * (2 * 4096 * 4096 + 2 * 1024 * 4096 + 3 * 14336 * 4096)
    rate = s.cluster.device_memory_bandwidth
    assert rate is not None
    once = numbers * (TOUCHED_BYTES + 2) / rate
    assert unpacked_times(s) == pytest.approx(2.0, rel=0.01), "forward and backward, nothing is recomputed"
    assert unpack_s(s) == pytest.approx(once * unpacked_times(s))
    cut = replace(s, policy=replace(s.policy, graph=False, chunk_tokens=s.tokens // 4))
    assert unpack_s(cut) == pytest.approx(4 * once * unpacked_times(cut)) and unpacked_times(cut) > 2.0
    assert estimate_time(s).compute_s > estimate_time(inputs()).compute_s


def test_nothing_packed_and_an_unknown_memory_take_no_time() -> None:
    s = inputs("adapter=qlora")
    assert unpack_s(inputs()) == 0.0
    assert unpack_s(replace(s, cluster=replace(s.cluster, device_memory_bandwidth=None))) == 0.0


def test_norms_of_rows_read_every_adapted_matrix_twice_in_each_pass() -> None:
    s = inputs("adapter.dora=true")
    numbers = 32 * (2 * 4096 * 4096 + 2 * 1024 * 4096 + 3 * 14336 * 4096)
    rate = s.cluster.device_memory_bandwidth
    assert rate is not None and 32 * s.turned_layer_parameters == numbers
    once = numbers * (2 * 2 / rate + 2 * 16 / s.gemm_rate)
    assert norms_s(s) == pytest.approx(once * unpacked_times(s)) and unpacked_times(s) > 2.5, "backward makes the values once more"
    assert norms_s(inputs()) == 0.0 and estimate_time(s).compute_s > estimate_time(inputs()).compute_s + norms_s(s)
