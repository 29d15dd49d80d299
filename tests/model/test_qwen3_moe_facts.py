"""What a Qwen3-MoE config.json says: one window for all layers or none, and both names of the number of experts."""

from __future__ import annotations

from pathlib import Path

import pytest

from efflaunch.tests.model.mixtures import assert_either_name, assert_windows_alike


@pytest.mark.parametrize(("used", "expected"), [(True, (9, 9)), (False, (None, None))])
def test_windows_are_hugging_faces(tmp_path: Path, used: bool, expected: tuple[int | None, ...]) -> None:
    assert assert_windows_alike(tmp_path, "qwen3_moe", use_sliding_window=used, sliding_window=9) == expected


def test_experts_are_counted_under_either_name(tmp_path: Path) -> None:
    assert_either_name(tmp_path, "qwen3_moe", "num_experts", "num_local_experts")
