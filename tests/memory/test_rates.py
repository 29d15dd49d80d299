"""Rates between a rank and where things wait: whose figure counts, what both directions and a disk make of it, and the update's time."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from efflaunch.cluster.config import Device
from efflaunch.cluster.rates import Copies, MachineRates, MeasuredRates
from efflaunch.errors import ConfigError
from efflaunch.estimate.build import build_ledger
from efflaunch.estimate.ledger import Ledger
from efflaunch.estimate.optimizer_residency import Residency
from efflaunch.estimate.plan_inputs import PlanInputs
from efflaunch.estimate.solver.evaluate import measures
from efflaunch.estimate.solver.solve import solve_memory
from efflaunch.estimate.timing.bandwidth import Link, host_link, offload_link
from efflaunch.estimate.timing.flops import layer_backward_s, layer_forward_s, layer_recompute_s
from efflaunch.estimate.timing.offload import backward_stall_s, forward_stall_s, inner_bytes, leaving_bytes, returning_bytes
from efflaunch.estimate.timing.update import adam_bytes, update_time
from efflaunch.memory.config import ActivationPlace, MemoryConfig
from efflaunch.parallel.config import GradReduce
from efflaunch.training.config import Dtype

from .settings import GIB, LLAMA_8B, SMALL, cluster, make_ledger

K = 1 << 10
HOSTED = MemoryConfig(
    name="m",
    layer_input=ActivationPlace.HOST,
    attention_output=ActivationPlace.RECOMPUTE,
    activations=ActivationPlace.RECOMPUTE,
    segment_layers=2,
)
LINK = tuple(Copies(out=(20 + rank) * 1e9, back=25e9, both_out=15e9, both_back=12e9 + rank) for rank in range(8))
RATES = MachineRates(device="cuda", ranks_per_node=8, link=LINK, device_update=2e12, host_update=3e10)


def short(**changes: Any) -> Ledger:
    """Sequences so short that copies show."""
    return make_ledger(length=K, tokens_per_rank=K, memory=HOSTED, machines=cluster(**changes))


def measured(inputs: PlanInputs, **changes: Any) -> PlanInputs:
    return replace(inputs, measured=MeasuredRates(rates=replace(RATES, **changes), source="profile.yaml"))


def with_dir(inputs: PlanInputs, directory: str = "/local") -> PlanInputs:
    return replace(inputs, policy=replace(inputs.policy, offload_dir=directory), memory=replace(inputs.memory, offload_dir=directory))


@pytest.mark.parametrize(("shared", "seconds"), [(0.0, 4.0), (0.5, 4.5), (1.0, 5.0)])
def test_a_way_takes_its_slower_direction_and_what_the_other_has_to_wait_for(shared: float, seconds: float) -> None:
    way = Link(out=2.0, back=4.0, shared=shared, source="")
    assert way.seconds(8, 4) == way.seconds(2, 16) == seconds
    assert way.seconds(8) == 4.0 and way.seconds(0, 8) == 2.0, "one direction has it all"
    assert way.seconds(way.both, way.both) == pytest.approx(1.0)


def test_what_was_measured_goes_before_the_clusters_figure() -> None:
    s = short().inputs
    assert host_link(s) == Link(50e9, 50e9, 0.0, "cluster.host_link_bandwidth")
    way = host_link(measured(s))
    assert (way.out, way.back, way.source) == (20e9, 25e9, "profile.yaml"), "the slowest rank's, of each"
    assert way.both == pytest.approx(12e9)
    free = tuple(Copies(out=20e9, back=25e9, both_out=20e9, both_back=25e9) for _ in range(8))
    jammed = tuple(Copies(out=20e9, back=25e9, both_out=5e9, both_back=5e9) for _ in range(8))
    assert [host_link(measured(s, link=link)).shared for link in (free, jammed)] == [0.0, 1.0]


def test_stalls_follow_the_way() -> None:
    """One direction in forward; in backward rows come back while inner inputs leave."""
    link = tuple(Copies(out=1e8 + rank, back=2e8, both_out=8e7, both_back=9e7) for rank in range(8))
    s = measured(short().inputs, link=link)
    assert forward_stall_s(s) == pytest.approx(leaving_bytes(s) / 1e8 - layer_forward_s(s))
    leaves, comes = inner_bytes(s) / 1e8, returning_bytes(s) / 2e8
    busy = max(leaves, comes) + (1 / 8e7 - 1 / 1e8) * 2e8 * min(leaves, comes)
    assert inner_bytes(s) > 0 and backward_stall_s(s) == pytest.approx(busy - layer_backward_s(s) - layer_recompute_s(s))
    assert measures(s).step_s() == pytest.approx(build_ledger(s.with_parts()).timing.step_s)


@pytest.mark.parametrize(
    ("given", "out", "back", "source"),
    [
        ({}, 50e9, 50e9, "no figure of the disk is given, so the link's: cluster.host_link_bandwidth"),
        ({"disk_write_bandwidth": 16e9, "disk_read_bandwidth": 24e9}, 2e9, 3e9,
         "cluster.disk_write_bandwidth and cluster.disk_read_bandwidth over 8 ranks"),
        ({"disk_write_bandwidth": 16e9}, 2e9, 50e9, "cluster.disk_write_bandwidth over 8 ranks"),
        ({"disk_write_bandwidth": 8e12, "disk_read_bandwidth": 8e12}, 50e9, 50e9,
         "cluster.disk_write_bandwidth and cluster.disk_read_bandwidth over 8 ranks"),
    ],
)  # fmt: skip
def test_ranks_share_a_disk_and_files_are_no_faster_than_the_link(given, out, back, source) -> None:
    s = with_dir(short(**given).inputs)
    way = offload_link(s)
    assert (way.out, way.back, way.source) == (out, back, source)
    assert any(source in text for text in build_ledger(s.with_parts()).timing.assumptions)
    if back == 3e9:
        assert way.seconds(2e9, 3e9) == pytest.approx(2.0), "one thing after the other"
        assert forward_stall_s(s) == pytest.approx(max(0.0, leaving_bytes(s) / 2e9 - layer_forward_s(s)))


def test_a_measured_disk_is_its_directorys() -> None:
    disk = (Copies(out=1e9, back=2e9, both_out=0.8e9, both_back=0.8e9),)
    duplex = tuple(Copies(out=20e9, back=25e9, both_out=20e9, both_back=25e9) for _ in range(8))
    s = measured(short(disk_write_bandwidth=16e9, disk_read_bandwidth=16e9).inputs, link=duplex, disk=disk, directory="/local")
    assert offload_link(with_dir(s)) == Link(1e9, 2e9, pytest.approx(0.5), "profile.yaml")
    assert offload_link(with_dir(s, "/other")).out == 2e9


def test_a_slow_link_moves_less() -> None:
    """The solver goes by it: what it sent to the host over the fast link, it makes again."""
    memory = MemoryConfig(name="auto", solve=True)
    s = make_ledger(
        SMALL, length=4 * K, tokens_per_rank=64 * K, batch=128 * K, memory=memory, loss_chunk=256,
        machines=cluster(ranks_per_node=2, device_memory_bytes=int(3.2 * GIB), host_memory_bytes=64 * GIB, host_link_bandwidth=1e12),
    ).asked  # fmt: skip
    crawl = tuple(Copies(out=1e7, back=1e7, both_out=1e7, both_back=1e7) for _ in range(2))
    fast, slow = (solve_memory(setting)[0] for setting in (s, measured(s, link=crawl, ranks_per_node=2)))
    assert leaving_bytes(fast) > 0 and leaving_bytes(slow) < leaving_bytes(fast) / 10


@pytest.mark.parametrize("key", ["host_link_bandwidth", "disk_write_bandwidth", "host_memory_bandwidth", "peak_flops"])
@pytest.mark.parametrize("value", [0.0, -1.0, float("nan")])
def test_speeds_that_are_none(key: str, value: float) -> None:
    with pytest.raises(ConfigError, match=rf"cluster.{key}: found .*; expected more than 0"):
        short(**{key: value})


def llama(residency: Residency | None = None, batch: int = 64 * K, reduce: GradReduce = GradReduce.AUTO, **changes: Any) -> PlanInputs:
    machines = cluster(device_memory_bandwidth=2e12, host_memory_bandwidth=240e9, **changes)
    ledger = make_ledger(LLAMA_8B, length=64 * K, tokens_per_rank=8 * K, batch=batch, machines=machines, grad_reduce=reduce)
    return replace(ledger.inputs, residency=residency or Residency())


def test_an_update_on_the_device_is_its_bytes() -> None:
    s = llama(Residency(clipped=False))
    numbers = s.parameters / 8
    assert adam_bytes(4, 4) == 28
    assert update_time(s).shown_s == pytest.approx(numbers * (28 + 4) / 2e12), "weight and moments there and back, the gradient twice"
    assert update_time(llama()).shown_s == pytest.approx(numbers * (28 + 4 + 8) / 2e12), "and scaled"
    assert update_time(llama(Residency(moment_bytes=2.0, clipped=False))).shown_s == pytest.approx(numbers * (20 + 4) / 2e12)
    assert update_time(llama(Residency(in_backward=True))).shown_s == update_time(llama()).shown_s, "the same device does it"


def test_an_update_on_the_host_is_its_bytes_and_copies() -> None:
    """After backward nothing hides it; gradients came down beside backward."""
    s = llama(Residency(on_host=True, clipped=False))
    numbers = s.parameters / 8
    update = update_time(s)
    assert update.busy_s == pytest.approx(numbers * (28 + 4 + 4 + 2) / 30e9) and update.link_s == pytest.approx(numbers * 6 / 50e9)
    assert numbers * 4 / 50e9 < 32 * layer_backward_s(s) and update.shown_s == pytest.approx(update.busy_s)
    slow = replace(s, cluster=replace(s.cluster, host_link_bandwidth=1e8))
    backward = 32 * layer_backward_s(slow)
    assert update_time(slow).shown_s == pytest.approx(numbers * 4 / 1e8 - backward + max(update.busy_s, numbers * 2 / 1e8))


def test_an_update_in_backward_hides_but_for_its_end() -> None:
    s = llama(Residency(on_host=True, in_backward=True, clipped=False))
    update, backward = update_time(s), 32 * layer_backward_s(s)
    tail = update.busy_s * (s.layer_parameters + s.root_parameters) / s.parameters
    assert update.busy_s < backward and update.shown_s == pytest.approx(tail)
    slow = replace(s, cluster=replace(s.cluster, host_memory_bandwidth=2.4e9))
    assert update_time(slow).shown_s == pytest.approx(100 * update.busy_s - backward), "the host is what takes the time"


def test_sums_of_micro_batches_travel_each_time() -> None:
    once = llama(Residency(on_host=True, clipped=False), batch=256 * K, reduce=GradReduce.STEP)
    each = llama(Residency(on_host=True, clipped=False), batch=256 * K, reduce=GradReduce.MICRO_BATCH)
    numbers = once.parameters / 8
    assert once.layout.num_micro_batches == 4
    assert update_time(each).link_s - update_time(once).link_s == pytest.approx(3 * numbers * 4 / 50e9)
    assert update_time(each).busy_s - update_time(once).busy_s == pytest.approx(3 * numbers * 12 / 30e9)


def test_without_a_gpu_the_ranks_update_on_their_share_and_nothing_hides() -> None:
    machines = cluster(device=Device.CPU, ranks_per_node=2, host_memory_bandwidth=20e9, host_link_bandwidth=5e9)
    s = make_ledger(SMALL, length=4 * K, tokens_per_rank=4 * K, machines=machines, dtype=Dtype.FLOAT32).inputs
    numbers = s.parameters / 2
    assert update_time(s).shown_s == pytest.approx(numbers * 40 / 10e9)
    hosted = replace(s, residency=Residency(on_host=True, in_backward=True))
    assert update_time(hosted).shown_s == pytest.approx(numbers * 48 / 10e9 + numbers * 8 / 5e9)


def test_the_update_is_in_the_step_and_in_the_solvers_constant() -> None:
    s = llama(Residency(on_host=True))
    ledger = build_ledger(s.with_parts())
    assert ledger.timing.update_s == update_time(s).shown_s > 0
    parts = ("compute_s", "sequence_s", "sharding_s", "host_s", "update_s")
    assert ledger.timing.step_s == pytest.approx(sum(getattr(ledger.timing, name) for name in parts))
    assert measures(s).step_s() == pytest.approx(ledger.timing.step_s)
    without = replace(s, cluster=replace(s.cluster, host_memory_bandwidth=None))
    assert "takes no time but that of its copies: cluster.host_memory_bandwidth is not given" in update_time(without).assumption
    assert update_time(measured(s)).busy_s == pytest.approx(update_time(s).busy_s), "30 GB/s either way"


def test_a_pass_for_the_norm_doubles_all_but_the_update() -> None:
    one = llama(Residency(in_backward=True, clipped=True))
    two = replace(one, residency=replace(one.residency, two_passes=True))
    single, double = build_ledger(one.with_parts()).timing, build_ledger(two.with_parts()).timing
    assert double.step_s - double.update_s == pytest.approx(2 * (single.step_s - single.update_s))
    assert double.flops == 2 * single.flops and double.model_flops == single.model_flops
    assert measures(two).step_s() == pytest.approx(double.step_s)
