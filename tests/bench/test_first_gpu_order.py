"""The section about the order of sums, on the CPU's kernel, which has one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from efflaunch.bench import first_gpu_order as section
from efflaunch.bench.gpu_section import Scale
from efflaunch.parallel.sequence.attention import CpuKernel

TINY = Scale("cpu", True, Path(), 60.0)


class Restless(CpuKernel):
    """One whose gradients change each time."""

    def backward(self, do: Tensor, *others: Any) -> tuple[Tensor, Tensor, Tensor]:
        dq, dk, dv = super().backward(do, *others)
        return dq + torch.rand(()), dk, dv


def test_the_cpu_repeats_its_bits_and_the_process_is_as_before() -> None:
    found = section.order(TINY)
    assert found["ok"] and set(found["kernels"]) == {"cpu, free", "cpu, in order"}
    assert {row["differ"] for row in found["kernels"].values()} == {0}
    assert not torch.are_deterministic_algorithms_enabled()


def test_a_kernel_that_does_not_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(section, "kernels_for", lambda device, case: [("restless", Restless()), ("absent", "is not installed")])
    found = section.order(TINY)
    assert not found["ok"] and found["kernels"]["restless, in order"]["differ"] == section.TIMES
    assert found["kernels"]["absent, in order"] == {"refused": "is not installed"}
