"""What a Mixtral config.json says: a window for every layer or none, and both names of the number of experts."""

from __future__ import annotations

from pathlib import Path

import pytest

from efflaunch.tests.model.mixtures import assert_either_name, assert_windows_alike


@pytest.mark.parametrize("window", [9, None])
def test_windows_are_hugging_faces(tmp_path: Path, window: int | None) -> None:
    assert assert_windows_alike(tmp_path, "mixtral", sliding_window=window) == (window, window)


def test_experts_are_counted_under_either_name(tmp_path: Path) -> None:
    assert_either_name(tmp_path, "mixtral", "num_local_experts", "num_experts")
