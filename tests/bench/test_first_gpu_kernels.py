"""The sections about kernels, on those of the CPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from efflaunch.bench import first_gpu_kernels as kernels
from efflaunch.bench.gpu_section import Scale
from efflaunch.parallel.sequence.attention import CpuKernel

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


class Uneven(CpuKernel):
    """A kernel that loses its last rows' gradients."""

    def backward(self, *args):
        dq, dk, dv = super().backward(*args)
        dq = dq.clone()
        dq[-1] += 1.0
        return dq, dk, dv


def test_every_kind_of_block_is_compared_with_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    found = kernels.attention(TINY)
    assert len(found["worst"]) == len(kernels.SHAPES) and found["ok"] and max(found["worst"].values()) < 1e-4
    monkeypatch.setattr(kernels, "kernels_for", lambda device: {"off": Off()})
    assert not kernels.attention(TINY)["ok"]


def test_ends_of_a_long_block_are_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    found = kernels.int32(TINY)
    assert found["ok"] and found["kernel"] == "CpuKernel" and not found["beyond_int32"]
    monkeypatch.setattr(kernels, "block_kernel", lambda device: Uneven())
    assert not kernels.int32(TINY)["ok"]


def test_speeds_and_packs_have_a_figure_each() -> None:
    speeds = kernels.speed(TINY)["tflops"]
    assert set(speeds) == {"CpuKernel 64x4", "CpuKernel 64x32"} and all(min(row.values()) > 0 for row in speeds.values())
    packs = kernels.packs(TINY)["packs"]
    assert {name: row["blocks"] for name, row in packs.items()} == {"1 x 16": 1, "4 x 32": 4, "16 x 8": 16}
    assert all(0 < row["host_s"] <= row["total_s"] for row in packs.values())


def test_the_kernel_of_runs_comes_first() -> None:
    assert list(kernels.kernels_for(torch.device("cpu"))) == ["CpuKernel"]
