"""The sections about the device and the ways to it, on a CPU."""

from __future__ import annotations

import warnings
from pathlib import Path

import torch

from efflaunch.bench import first_gpu_paths as paths
from efflaunch.bench.gpu_jobs import policies
from efflaunch.bench.gpu_section import Scale

TINY = Scale("cpu", True, Path(), 60.0)


def test_facts_of_a_machine() -> None:
    found = paths.device(TINY)
    assert found["torch"] == torch.__version__ and set(found["packages"]) == set(paths.PACKAGES) and "total_gib" not in found


def test_every_policy_is_looked_at_for_hidden_waits() -> None:
    found = paths.syncs(TINY)
    assert set(found["policies"]) == set(policies(16)) and not found["can_see"]
    assert all(row == {"syncs": 0, "places": []} for row in found["policies"].values())


def test_a_warning_of_a_wait_is_noted_with_its_place() -> None:
    with paths._sync_places(torch.device("cpu")) as places:
        warnings.warn("called a synchronizing CUDA operation", stacklevel=1)
        warnings.warn("something else", stacklevel=1)
    assert len(places) == 1


def test_pages_are_touched_and_copies_overlap() -> None:
    assert set(paths.pinning(TINY)["pages"]) == {"plain", "huge"}
    found = paths.offload(TINY)
    assert found["link"]["out"] > 0 and min(found[key] for key in ("copies_s", "products_s", "both_s")) > 0
