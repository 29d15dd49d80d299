"""Sizes of sections."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from efflaunch.bench.gpu_section import Scale


def test_small_sizes_are_for_tiny_runs_alone() -> None:
    scale = Scale("cpu", True, Path(), 1.0)
    assert scale.pick(1000, 3) == 3 and replace(scale, tiny=False).pick(1000, 3) == 1000
