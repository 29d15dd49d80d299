"""What rank 0 decides, or fails with, reaches every rank; what a node says of itself does too."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist

from efflaunch.cluster.rates import Copies, MachineRates
from efflaunch.errors import PlanError
from efflaunch.estimate.measured.profile import Profile, ProfileKey, save_profile
from efflaunch.launcher.config.compose import compose
from efflaunch.memory.offload.checks import FreeMemory
from efflaunch.tests.ranks import RankPool
from efflaunch.training import agreed_ledger as certified
from efflaunch.training import oom
from efflaunch.training.agreed_rates import frozen_rates

QUICK = ["+experiment=quickstart", "cluster.ranks_per_node=2", "parallel.tokens_per_rank=8K"]


@pytest.fixture(scope="module")
def pool():
    with RankPool() as pool:
        yield pool


def _agree(words: list[str], failure: str) -> Any:
    """On a rank: the ledger's policy, or what it raised; rank 0 fails with `failure`, if any is given."""
    config = compose(words)
    real = certified.build_ledger

    def failing(*arguments: Any) -> Any:
        if failure and dist.get_rank() == 0:
            raise ValueError(failure)
        assert dist.get_rank() == 0, "the others are told"
        return real(*arguments)

    certified.build_ledger = failing
    try:
        return certified.agreed_ledger(config, torch.device("cpu")).inputs.policy
    except (RuntimeError, ValueError, PlanError) as error:
        return type(error).__name__, str(error)
    finally:
        certified.build_ledger = real


@pytest.mark.parametrize("memory", ["auto", "recompute"])
def test_an_error_inside_rank_0_ends_every_rank(pool, memory):
    first, second = pool.run(_agree, [*QUICK, f"memory={memory}"], "a mistake of ours", ranks=2)
    assert first == ("ValueError", "a mistake of ours")
    assert second[0] == "RuntimeError" and "ValueError: a mistake of ours" in second[1]


def test_all_ranks_get_the_same_ledger_or_the_same_error(pool):
    policies = pool.run(_agree, [*QUICK, "memory=auto"], "", ranks=2)
    assert policies[0] == policies[1]
    errors = pool.run(_agree, [*QUICK, "memory=auto", "cluster.device_memory_bytes=64MiB"], "", ranks=2)
    assert errors[0] == errors[1] and errors[0][0] == "PlanError"


def _planned(words: list[str], sizes: list[int]) -> Any:
    """On a rank with a GPU of its size: capacity, peak and layout of the ledger, or what was raised."""
    config = compose(words)
    certified.real_capacity = lambda device: sizes[dist.get_rank()]  # type: ignore[assignment]
    try:
        ledger = certified.agreed_ledger(config, torch.device("cpu"))
    except PlanError as error:
        return str(error)
    return ledger.device.capacity_bytes, ledger.device.peak_bytes, str(ledger.inputs.policy)


def test_every_rank_plans_for_the_smallest_gpu(pool):
    words, gib = [*QUICK, "memory=auto"], 1 << 30
    whole = pool.run(_planned, words, [200 * gib, 100 * gib], ranks=2)[0]
    configured = compose(words).cluster.device_memory_bytes
    assert whole[0] == configured, "more than configured is not used"
    size = whole[1] - 4096
    first, second = pool.run(_planned, words, [200 * gib, size], ranks=2)
    assert first == second and first[0] == size and first[1] <= size < whole[1] and first[2] != whole[2]
    refused = pool.run(_planned, words, [64 << 20, 200 * gib], ranks=2)
    assert refused[0] == refused[1] and "no policy that fits" in refused[0]
    given = pool.run(_planned, [*QUICK, "memory=keep"], [64 << 20, 200 * gib], ranks=2)
    assert given[0][0] == 64 << 20 < given[0][1], "a given policy may run: the ledger is an upper bound"


def test_ranks_on_a_cpu_have_what_is_configured():
    assert certified.real_capacity(torch.device("cpu")) is None


def _host_error(words: list[str]) -> str:
    """On a rank of a node of its own, of which the second is full."""
    rank = dist.get_rank()
    oom.free_memory = lambda: FreeMemory(10 + rank, f"limit of node {rank}")  # type: ignore[assignment]
    oom.socket.gethostname = lambda: f"node{rank}"  # type: ignore[assignment]
    config = compose(words)
    ledger = certified.agreed_ledger(config, torch.device("cpu"))
    return str(oom.host_error(ledger, 1, 5 << 20, step=3, resume="efflaunch resume runs/run"))


def test_the_full_nodes_own_message_is_raised_everywhere(pool):
    texts = pool.run(_host_error, [*QUICK, "memory=recompute"], ranks=2)
    assert texts[0] == texts[1]
    assert "host memory, on node1, the node of rank 1, after step 3: found 5.0 MiB left (limit of node 1)" in texts[0]


def test_a_run_keeps_the_rates_it_began_with(tmp_path, monkeypatch):
    """As with its cost model: until parallel.profile names a file, or the machine is another one."""
    monkeypatch.chdir(tmp_path)
    begun, config = tmp_path / "run", compose(QUICK)
    begun.mkdir()
    assert frozen_rates(config, "a processor", begun) is None
    save_profile(tmp_path / "profile.yaml", _profile(1e9))
    assert frozen_rates(config, "a processor", begun) is None, "settled without"
    fresh = tmp_path / "fresh"
    fresh.mkdir()
    first = frozen_rates(config, "a processor", fresh)
    assert first is not None and first.rates.host_update == 1e9 and frozen_rates(config, "a processor", None) == first
    save_profile(tmp_path / "profile.yaml", _profile(2e9))
    assert frozen_rates(config, "a processor", fresh) == first
    named = frozen_rates(compose([*QUICK, "parallel.profile=profile.yaml"]), "a processor", fresh)
    assert named is not None and named.rates.host_update == 2e9
    assert frozen_rates(config, "another processor", fresh) is None


def _profile(rate: float) -> Profile:
    copies = (Copies(out=rate, back=rate, both_out=rate, both_back=rate),) * 2
    rates = MachineRates(device="cpu", ranks_per_node=2, link=copies, device_update=rate, host_update=rate)
    key = ProfileKey(hardware="a processor", ranks="1 node x 2 ranks", model="m", versions="v")
    return Profile(key=key, degrees=(), overhead_s=0.0, gather_s=0.0, empty_s=0.0, step_s=0.0, rates=rates)
