"""The environment ranks are given."""

from __future__ import annotations

import pytest

from efflaunch.errors import ConfigError
from efflaunch.launcher import env
from efflaunch.launcher.config.compose import compose
from efflaunch.launcher.env import ALLOCATOR, CUBLAS, QUEUES, check_order, rank_environment


@pytest.fixture(autouse=True)
def nothing_set(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*ALLOCATOR, QUEUES, "OMP_NUM_THREADS", *env._IN_ORDER):
        monkeypatch.delenv(name, raising=False)


def test_segments_grow_on_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    on_cuda = compose(["+experiment=llama8b_1M"])
    assert rank_environment(on_cuda)["PYTORCH_ALLOC_CONF"] == "expandable_segments:True"
    on_cpu = compose(["+experiment=quickstart"])
    assert "PYTORCH_ALLOC_CONF" not in rank_environment(on_cpu)
    for name in ALLOCATOR:
        with monkeypatch.context() as patch:
            patch.setenv(name, "max_split_size_mb:512")
            assert not rank_environment(on_cuda).keys() & set(ALLOCATOR), "what the user has set stays"


def test_a_planned_arena_brings_its_own_allocator() -> None:
    config = compose(["+experiment=llama8b_1M", "memory.arena=planned"])
    assert "PYTORCH_ALLOC_CONF" not in rank_environment(config)


def test_ranks_of_one_machine_stay_on_loopback(monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")
    for name in names:
        monkeypatch.delenv(name, raising=False)
    local, slurm = compose(["+experiment=quickstart"]), compose(["+experiment=quickstart", "launcher=slurm"])
    assert [rank_environment(local)[name] for name in names] == ["lo", "lo"]
    assert rank_environment(slurm, "ib0")["GLOO_SOCKET_IFNAME"] == "ib0" and "NCCL_SOCKET_IFNAME" not in rank_environment(slurm, "ib0")
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "eth1")
    assert "NCCL_SOCKET_IFNAME" not in rank_environment(local), "what the user has set stays"


def test_ranks_that_update_weights_of_gpus_share_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(env, "_cores", lambda: 112)

    def threads(*overrides: str) -> str:
        return rank_environment(compose(list(overrides)))["OMP_NUM_THREADS"]

    on_host = ("+experiment=llama8b_1M", "cluster.ranks_per_node=8", "optim.state_device=host")
    assert threads(*on_host) == "14" and threads("+experiment=llama8b_1M") == "1"
    assert threads("+experiment=quickstart", "optim.state_device=host") == "1", "on a CPU they would compute with other sums"
    assert threads(*on_host, "launcher.threads_per_rank=3") == "3"
    monkeypatch.setenv("OMP_NUM_THREADS", "6")
    assert threads(*on_host) == threads("+experiment=quickstart") == "6", "what the user has set stays"
    assert threads(*on_host, "launcher.threads_per_rank=3") == "3"
    monkeypatch.delenv("OMP_NUM_THREADS")
    monkeypatch.setattr(env, "_cores", lambda: 4)
    assert threads(*on_host) == "1"


def test_streams_of_a_gpu_have_queues_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    on_cuda = compose(["+experiment=llama8b_1M"])
    assert rank_environment(on_cuda)[QUEUES] == "32" and QUEUES not in rank_environment(compose(["+experiment=quickstart"]))
    monkeypatch.setenv(QUEUES, "1")
    assert QUEUES not in rank_environment(on_cuda)


def test_libraries_add_in_order_where_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """They read it when they are loaded, so it is there before; on a CPU there is nothing to set."""
    free, ordered = (compose(["+experiment=llama8b_1M", f"train.deterministic={asked}"]) for asked in ("false", "true"))
    assert not rank_environment(free).keys() & env._IN_ORDER.keys()
    given = rank_environment(ordered)
    assert (given[CUBLAS], given["NCCL_ALGO"], given["TORCHINDUCTOR_DETERMINISTIC"]) == (":4096:8", "^NVLS,NVLSTree", "1")
    assert CUBLAS not in rank_environment(compose(["+experiment=quickstart", "train.deterministic=true"]))
    monkeypatch.setenv("NCCL_ALGO", "Ring")
    assert "NCCL_ALGO" not in rank_environment(ordered), "what the user has set stays"
    monkeypatch.setenv(CUBLAS, ":16:8")
    check_order(ordered)
    assert CUBLAS not in rank_environment(ordered)
    for name, value in (("NCCL_ALGO", "NVLS,Ring"), ("NCCL_ALGO", "^NVLSTree"), ("TORCHINDUCTOR_DETERMINISTIC", "0")):
        with monkeypatch.context() as other, pytest.raises(ConfigError, match=f"{name}: found '"):
            other.setenv(name, value)
            check_order(ordered)
    monkeypatch.setenv(CUBLAS, ":4096:2")
    check_order(free)
    with pytest.raises(ConfigError) as refused:
        check_order(ordered)
    assert (refused.value.where, refused.value.found) == (CUBLAS, "':4096:2'") and refused.value.hint.startswith(f"unset {CUBLAS}")
