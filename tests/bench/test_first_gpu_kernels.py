"""The sections about kernels, on those of the CPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from efflaunch.bench import first_gpu_kernels as kernels
from efflaunch.bench.gpu_section import Scale
from efflaunch.parallel.sequence.attention import CpuKernel
from efflaunch.parallel.sequence.kernel_choice import AttentionCase, Installed

TINY = Scale("cpu", True, Path(), 60.0)


def test_tables_of_the_last_positions_are_right_and_wrong_ones_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    found = kernels.rope(TINY)
    assert set(found["errors"]) == {"highest", "high", "medium"} and found["ok"]
    exact = kernels.rotary_tables

    def coarse(rotary, like, positions, lengths):
        """Positions of ten bits of mantissa."""
        return exact(rotary, like, positions.float().bfloat16().long(), lengths)

    monkeypatch.setattr(kernels, "rotary_tables", coarse)
    assert not kernels.rope(TINY)["ok"]


class Off(CpuKernel):
    """A kernel whose gradients of keys are those of other rows."""

    def backward(self, *args):
        dq, dk, dv = super().backward(*args)
        return dq, dk.roll(1, 0), dv


class OffInPacks(CpuKernel):
    """A kernel that is wrong where documents are joined."""

    def forward_documents(self, *args):
        o, lse = super().forward_documents(*args)
        return o.roll(1, 0), lse


class Broken(CpuKernel):
    """A library that takes no single block."""

    def forward(self, *args):
        raise RuntimeError("no such shape")

    def forward_documents(self, q, k, v, documents, spec):
        return CpuKernel().forward_documents(q, k, v, documents, spec)

    def backward_documents(self, *args):
        return CpuKernel().backward_documents(*args)


class Uneven(CpuKernel):
    """A kernel that loses its last rows' gradients."""

    def backward(self, *args):
        dq, dk, dv = super().backward(*args)
        dq = dq.clone()
        dq[-1] += 1.0
        return dq, dk, dv


def test_every_kind_of_block_is_compared_with_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    found = kernels.attention(TINY)
    assert len(found["worst"]) == len(kernels.SHAPES) + len(kernels.WINDOWS) and found["ok"] and max(found["worst"].values()) < 1e-4
    assert sum("4 documents of" in name for name in found["worst"]) == 2 and found["refused"] == found["failed"] == {}
    for wrong in (Off(), OffInPacks()):
        monkeypatch.setattr(kernels, "kernels_for", lambda device, case, wrong=wrong: [("off", wrong)])
        assert not kernels.attention(TINY)["ok"]


def test_what_a_kernel_refuses_or_breaks_at_costs_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "kernels_for", lambda device, case: [("none", "not here"), ("broken", Broken()), ("cpu", CpuKernel())])
    found = kernels.attention(TINY)
    rows = len(kernels.SHAPES) + len(kernels.WINDOWS)
    assert len(found["refused"]) == rows and len(found["failed"]) == len(kernels.SHAPES) and not found["ok"]
    assert len([name for name in found["worst"] if name.startswith("cpu")]) == rows
    speeds = kernels.speed(TINY)
    assert len(speeds["missing"]) == 4 and len(speeds["tflops"]) == 2


def test_every_kernel_is_tried_one_after_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that cannot do the case say so, and each is put in place when it is taken."""
    placed: list[str] = []
    monkeypatch.setattr(kernels, "installed_on", lambda device: Installed({"fa2": "2.8.3"}, (9, 0)))
    monkeypatch.setattr(kernels, "block_kernel", lambda device, choice: placed.append(choice.kernel) or choice.kernel)
    names = []
    for name, _ in kernels.kernels_for(torch.device("cuda", 0), AttentionCase("bfloat16", 256, 8, 1000)):
        names.append(name)
        assert not placed or placed[-1] in names
    assert names == ["fa4", "fa3", "fa2", "cudnn", "sdpa"] and placed == ["fa2", "sdpa"]


def test_ends_of_a_long_block_are_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    found = kernels.int32(TINY)
    assert found["ok"] and found["kernel"] == "CpuKernel" and not found["beyond_int32"]
    monkeypatch.setattr(kernels, "block_kernel", lambda device, choice: Uneven())
    assert not kernels.int32(TINY)["ok"]


def test_speeds_and_packs_have_a_figure_each() -> None:
    speeds = kernels.speed(TINY)["tflops"]
    assert set(speeds) == {"cpu 64x4", "cpu 64x32"} and all(min(row.values()) > 0 for row in speeds.values())
    packs = kernels.packs(TINY)["packs"]
    assert {name: row["blocks"] for name, row in packs.items()} == {"1 x 16": 1, "4 x 32": 1, "16 x 8": 1}, "as runs join them"
    assert all(0 < row["host_s"] <= row["total_s"] for row in packs.values())


def test_the_cpu_has_one_kernel() -> None:
    assert [name for name, _ in kernels.kernels_for(torch.device("cpu"), AttentionCase("float32", 16, 8, 100))] == ["cpu"]
