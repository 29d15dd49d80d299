"""What a run opens for activations that its policy moves."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from efflaunch.memory.policy import MOVED, MemoryPolicy
from efflaunch.training import setup


@pytest.mark.parametrize(("directory", "expected"), [(None, None), ("/disk", 25e9)])
def test_a_disk_slower_than_the_plan_thinks_will_be_named(directory, expected, monkeypatch):
    opened = []
    monkeypatch.setattr(setup, "open_store", lambda **settings: opened.append(settings))
    monkeypatch.setattr(setup, "check_host_room", lambda *_: None)
    monkeypatch.setattr(setup, "arena_bytes", lambda _: 1 << 20)
    monkeypatch.setattr(setup.dist, "barrier", lambda: None)
    setting = SimpleNamespace(
        policy=MemoryPolicy(layer_input=MOVED, offload_dir=directory),
        layout=SimpleNamespace(ranks_per_node=1),
        cluster=SimpleNamespace(host_link_bandwidth=25e9),
    )
    setup.host_store(setting, torch.device("cpu"))
    assert [settings["expected_write_bytes_per_s"] for settings in opened] == [expected]
    assert opened[0]["offload_dir"] == directory
