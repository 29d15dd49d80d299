"""Bytes of an optimizer by where it lives, against hand-made sums and against real buffers."""

from __future__ import annotations

from dataclasses import replace

import pytest

from efflaunch.checkpoint.config import CheckpointConfig, Replica
from efflaunch.errors import ConfigError
from efflaunch.estimate.footprint.host import host_terms
from efflaunch.estimate.footprint.optimizer import host_optimizer_bytes
from efflaunch.estimate.footprint.term import Phase
from efflaunch.estimate.ledger import device_account, host_account
from efflaunch.estimate.optimizer_residency import IN_FLIGHT, Residency, residency_of
from efflaunch.estimate.plan_inputs import PlanInputs
from efflaunch.memory.offload.checks import FreeMemory
from efflaunch.parallel.config import GradReduce
from efflaunch.tests.memory.settings import LLAMA_8B, cluster, make_ledger
from efflaunch.training.optimizers.config import OptimConfig
from efflaunch.training.optimizers.room import check_update_memory

K = 1024
HOST = Residency(on_host=True)
HOST_BACKWARD = Residency(on_host=True, in_backward=True)


def setting(residency: Residency, *, batch: int | None = None, reduce: GradReduce = GradReduce.AUTO) -> PlanInputs:
    """Llama 8B on 8 ranks of one node, 128K tokens."""
    made = make_ledger(LLAMA_8B, length=128 * K, tokens_per_rank=16 * K, batch=batch, grad_reduce=reduce).inputs
    return replace(made, residency=residency)


def by_name(inputs: PlanInputs) -> dict[str, int]:
    return {entry.name: entry.num_bytes for entry in device_account(inputs).terms}


def test_host_states_leave_two_bytes_a_parameter_on_the_device() -> None:
    device, host = setting(Residency()), setting(HOST)
    share = device.parameters / device.layout.shard
    assert by_name(device)["weights"] == int(4 * share) and by_name(device)["optimizer states"] == int(8 * share)
    assert by_name(host)["weights"] == int(2 * share) and "optimizer states" not in by_name(host)
    assert by_name(device)["gradients"] == device.master * device.parameters // device.layout.shard
    root_and_layer = 4 * (host.root_parameters + host.layer_parameters) / host.layout.shard
    assert by_name(host)["gradients"] == pytest.approx(root_and_layer, abs=8), "what travels at the end of backward"


@pytest.mark.parametrize(("residency", "bytes_per_parameter"), [(HOST, 16), (HOST_BACKWARD, 12)])
def test_host_bytes_a_parameter_are_those_of_the_arithmetic(residency: Residency, bytes_per_parameter: float) -> None:
    """12: float32 weight and two moments; 4 more where gradients wait for their norm. Besides, buffers of what travels."""
    s = setting(residency)
    travelling = (4 + 2) * (IN_FLIGHT * s.layer_parameters + s.root_parameters)
    assert host_optimizer_bytes(s) == pytest.approx((bytes_per_parameter * s.parameters + travelling) / s.layout.shard, abs=1)
    account = host_account(s, device_account(s))
    on_host = next(entry for entry in account.terms if entry.name == "optimizer states on the host")
    assert on_host.num_bytes == 8 * host_optimizer_bytes(s)


def test_fewer_bits_are_counted() -> None:
    plain, half = by_name(setting(Residency())), by_name(setting(Residency(moment_bytes=2.0)))
    assert half["optimizer states"] * 2 == pytest.approx(plain["optimizer states"], abs=1)
    eight = by_name(setting(Residency(moment_bytes=1.0 + 4 / 256)))
    assert eight["optimizer states"] == pytest.approx(plain["optimizer states"] * (1 + 1 / 64) / 4, rel=1e-6)


def test_updates_in_backward_free_gradients_but_not_sums_over_micro_batches() -> None:
    one, several = (
        {r: device_account(setting(Residency(in_backward=r), batch=batch, reduce=GradReduce.MICRO_BATCH)) for r in (False, True)}
        for batch in (128 * K, 4 * 128 * K)
    )
    for accounts, frees in ((one, True), (several, False)):
        phases = {
            r: next(e.by_phase for e in account.terms if e.name == "gradients") for r, account in accounts.items()
        }  # fmt: skip
        assert phases[True].get(Phase.OPTIMIZER, 0) == 0
        assert (phases[True][Phase.REDUCE] < phases[False][Phase.REDUCE]) == frees


def test_a_host_that_is_too_small_is_refused_before_anything_is_taken() -> None:
    s = setting(HOST)
    needed = 8 * host_optimizer_bytes(s)
    check_update_memory(s, FreeMemory(needed, "test"))
    check_update_memory(setting(Residency()), FreeMemory(0, "test"))
    refusal = r"(?s)optim\.state_device=host.*of host memory free.*optimizer of 8 ranks.*optim\.update=backward"
    with pytest.raises(ConfigError, match=refusal):
        check_update_memory(s, FreeMemory(needed - 1, "test"))


@pytest.mark.parametrize(("nodes", "copies"), [(1, 2), (2, 4)])
def test_replicas_of_snapshots_and_their_pool_are_counted_on_the_host(nodes: int, copies: int) -> None:
    ledger = make_ledger(length=8 << 10, tokens_per_rank=8 << 10, batch=nodes * 64 << 10, machines=cluster(num_nodes=nodes))
    checkpoint = CheckpointConfig(name="c", replica=Replica.PEER, pool_bytes=1 << 30)
    asked = residency_of(OptimConfig(name="o", lr=1.0), checkpoint)
    terms = {entry.name: entry.num_bytes for entry in host_terms(replace(ledger.inputs, residency=asked), 0)}
    # Llama 8B: weights and two moments of 4 bytes, over all ranks; eight ranks a node.
    state = ledger.inputs.parameters * 12 // (8 * nodes)
    assert terms["checkpoint replicas"] == copies * 8 * state
    assert terms["checkpoint snapshots"] == 8 * (1 << 30)
    without = {entry.name for entry in host_terms(ledger.inputs, 0)}
    assert "checkpoint replicas" not in without and "checkpoint snapshots" in without
