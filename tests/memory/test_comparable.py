"""What a certificate says can be measured."""

from __future__ import annotations

import pytest

from efflaunch.estimate.certificate import certify
from efflaunch.estimate.footprint.device import UNSEEN
from efflaunch.launcher.config.compose import compose
from efflaunch.launcher.config.ledger import plan

MAPPED = ("checkpoint snapshots", "data staging")
"""Memory of the node that its ranks have mapped."""


@pytest.mark.parametrize("words", [["memory=recompute"], ["memory=memo"], ["memory=alst", "optim.state_device=host"]])
def test_a_rank_without_a_gpu_is_seen_with_what_it_moved_to_the_host(words: list[str]) -> None:
    """Resident memory has the arena and the optimizer's states in it, wherever the ledger books them."""
    ledger = plan(compose(["+experiment=quickstart", *words]))
    waiting = sum(entry.num_bytes for entry in ledger.host.terms if entry.name.endswith("on the host"))
    mapped = sum(entry.num_bytes for entry in ledger.host.terms if entry.name in MAPPED)
    assert mapped > 0 and (waiting > 0) == (words != ["memory=recompute"])
    expected = ledger.device.peak_bytes + waiting // ledger.layout.ranks_per_node + mapped // ledger.layout.ranks_per_node
    assert certify(ledger).comparable_bytes == expected


def test_a_gpu_s_allocator_sees_tensors_on_the_gpu_alone() -> None:
    ledger = plan(compose(["+experiment=llama8b_1M", "memory=memo"]))
    phase = ledger.device.peak_phase
    expected = sum(entry.by_phase.get(phase, 0) for entry in ledger.device.terms if entry.name not in UNSEEN)
    assert certify(ledger).comparable_bytes == expected


def test_files_are_in_nobodys_memory() -> None:
    ledger = plan(compose(["+experiment=quickstart", "memory=alst", "memory.offload_dir=/tmp"]))
    mapped = sum(entry.num_bytes for entry in ledger.host.terms if entry.name in MAPPED)
    assert certify(ledger).comparable_bytes == ledger.device.peak_bytes + mapped // ledger.layout.ranks_per_node
