"""The environment ranks are given."""

from __future__ import annotations

import pytest

from efflaunch.launcher.config.compose import compose
from efflaunch.launcher.env import ALLOCATOR, rank_environment


@pytest.fixture(autouse=True)
def nothing_set(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ALLOCATOR:
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
