"""What a run opens for activations that its policy moves."""

from __future__ import annotations

import pytest
import torch

from efflaunch.memory.config import ActivationPlace, MemoryConfig
from efflaunch.tests.memory.settings import cluster, make_ledger
from efflaunch.training import session as setup


@pytest.mark.parametrize(
    ("directory", "speeds", "expected"),
    [(None, {}, None), ("/disk", {}, 25e9), ("/disk", {"disk_write_bandwidth": 8e9}, 1e9), ("/disk", {"disk_write_bandwidth": 8e12}, 25e9)],
)
def test_a_disk_slower_than_the_plan_thinks_will_be_named(directory, speeds, expected, monkeypatch):
    """Held against the rate the estimate goes by: a rank's share of the disk, or the link's where that is less or nothing is known."""
    opened = []
    monkeypatch.setattr(setup, "open_store", lambda **settings: opened.append(settings))
    monkeypatch.setattr(setup, "check_offload_space", lambda *_: None)
    monkeypatch.setattr(setup, "whole_world", lambda: None)
    monkeypatch.setattr(setup.dist, "barrier", lambda group: None)
    memory = MemoryConfig(
        name="m",
        layer_input=ActivationPlace.HOST,
        attention_output=ActivationPlace.RECOMPUTE,
        activations=ActivationPlace.RECOMPUTE,
        offload_dir=directory,
    )
    ledger = make_ledger(length=1 << 13, tokens_per_rank=1 << 10, memory=memory, machines=cluster(host_link_bandwidth=25e9, **speeds))
    setup.host_store(ledger, torch.device("cpu"))
    assert [settings["expected_write_bytes_per_s"] for settings in opened] == [expected]
    assert opened[0]["offload_dir"] == directory
