"""The environment ranks are given."""

from __future__ import annotations

import pytest

from efflaunch.launcher.compose import compose
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
