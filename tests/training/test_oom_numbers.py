"""What a rank that ran out of memory says it held, by the allocator there is."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from efflaunch.training.oom import numbers_of

LEDGER = SimpleNamespace(
    device=SimpleNamespace(terms=(SimpleNamespace(name="context", num_bytes=5), SimpleNamespace(name="weights", num_bytes=9)))
)


@pytest.mark.parametrize("backend", ["native", "pluggable"])
def test_a_planned_arena_has_no_statistics_and_its_report_does_not_ask_for_them(backend, monkeypatch):
    def allocated(device):
        if backend == "pluggable":
            raise RuntimeError("CUDAPluggableAllocator does not yet support getDeviceStats")
        return 60

    monkeypatch.setattr(torch.cuda, "get_allocator_backend", lambda: backend)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (10, 100))
    monkeypatch.setattr(torch.cuda, "memory_allocated", allocated)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 70)
    numbers = numbers_of(LEDGER, torch.device("cuda", 0), 7, 0)
    assert (numbers.requested, numbers.total) == (7, 100)
    assert (numbers.active, numbers.reserved, numbers.others) == ((85, 85, 0) if backend == "pluggable" else (60, 70, 15))
