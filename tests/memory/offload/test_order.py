"""Copies on a device that works when it likes never read or write memory that has another use by then."""

from __future__ import annotations

from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from efflaunch.memory.offload.host_pool import HostArena
from efflaunch.memory.offload.host_store import ArenaStore
from efflaunch.memory.offload.streams import Transfers

from .fake import COMPUTE, IN, OUT, FakeDevice
from .program import Program

LAZY_COPIES = {COMPUTE: 1.0, OUT: 0.0, IN: 0.0}
LAZY_COMPUTE = {COMPUTE: 0.0, OUT: 1.0, IN: 1.0}
LAZY_OUT = {COMPUTE: 1.0, OUT: 0.0, IN: 1.0}
LAZY_IN = {COMPUTE: 1.0, OUT: 1.0, IN: 0.0}
ALL_LAZY = {COMPUTE: 0.0, OUT: 0.0, IN: 0.0}
SLOW_COMPUTE = {COMPUTE: 0.3, OUT: 1.0, IN: 1.0}
SCHEDULES = [SLOW_COMPUTE, LAZY_COPIES, LAZY_COMPUTE, LAZY_OUT, LAZY_IN, ALL_LAZY]


def program(device: FakeDevice, *, in_flight_bytes: int = 60, capacity_bytes: int = 4096) -> Program:
    return Program(device, ArenaStore(HostArena(capacity_bytes, block_bytes=16), device, in_flight_bytes))


@pytest.mark.parametrize("eagerness", SCHEDULES)
def test_training_steps(eagerness: dict[str, float]) -> None:
    run = program(FakeDevice(eagerness=eagerness))
    for _ in range(3):
        run.training_step(num_layers=2, num_chunks=4)
    assert run.wrong() == [] and len(run.seen) == 24


chance = st.sampled_from([0.0, 0.2, 0.7, 1.0])


@given(st.integers(0, 10**6), chance, chance, chance)
@settings(max_examples=150)
def test_any_program_on_any_schedule(seed: int, compute: float, out: float, into: float) -> None:
    run = program(FakeDevice(eagerness={COMPUTE: compute, OUT: out, IN: into}, seed=seed))
    random = Random(seed)
    for _ in range(40):
        run.random_step(random, most_parcels=10)
    assert run.wrong() == []
    assert run.store.stats.waste_bytes >= 0


@pytest.mark.parametrize("fault", ["hold", "hold_landings", "out_after", "in_after"])
def test_the_fake_device_shows_each_order_that_is_not_kept(fault: str) -> None:
    """Otherwise the tests above would prove nothing."""
    assert any(_goes_wrong(eagerness, frozenset([fault])) for eagerness in SCHEDULES)


def _goes_wrong(eagerness: dict[str, float], faults: frozenset[str]) -> bool:
    run = program(FakeDevice(eagerness=eagerness, faults=faults))
    for _ in range(3):
        run.training_step(num_layers=2, num_chunks=4)
    return run.wrong() != []


def test_the_fake_device_shows_a_source_that_is_not_kept_alive(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Transfers, "_let_go", lambda transfers: transfers._leaving.clear())
    assert _goes_wrong(LAZY_COPIES, frozenset())


def test_sources_in_flight_are_bounded() -> None:
    """Whatever the copies do: at most in_flight_bytes of sources, or one that is larger."""
    device = FakeDevice(eagerness=ALL_LAZY)
    run = program(device, in_flight_bytes=60)
    for _ in range(20):
        run.put(24)
        assert device.live_bytes[COMPUTE] <= 48
    run.put(200)
    assert device.live_bytes[COMPUTE] == 200
    run.put(24)
    assert device.live_bytes[COMPUTE] == 24
    assert device.num_done[COMPUTE] == 0, "the host never waited"


def test_landing_buffers_live_from_prefetch_to_done() -> None:
    device = FakeDevice(eagerness=ALL_LAZY)
    run = program(device)
    for num_bytes in (24, 64):
        run.put(num_bytes)
    first, second = run.parcels
    run.store.prefetch(first)
    run.store.prefetch(first)
    assert device.live_bytes[IN] == 24
    run.use(second)
    assert device.live_bytes[IN] == 24
    run.use(first)
    assert device.live_bytes[IN] == 0
    assert run.store.stats.bytes_to_device == 88
    assert device.num_done[IN] == 0, "the host never waited"
    assert run.wrong() == []


def test_an_aborted_step_leaves_nothing() -> None:
    device = FakeDevice(eagerness=ALL_LAZY)
    run = program(device, capacity_bytes=256)
    for _ in range(2):
        for num_bytes in (24, 64):
            run.put(num_bytes)
        run.store.prefetch(next(iter(run.parcels)))
        run.store.reset()
        run.parcels.clear()
        assert device.live_bytes == {COMPUTE: 0, IN: 0}
    run.training_step(num_layers=1, num_chunks=8)
    assert run.wrong() == []
    run.store.close()
