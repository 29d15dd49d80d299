"""Ministral as its config.json says it: windows by type, or of all layers."""

from __future__ import annotations

from pathlib import Path

from efflaunch.tests.model.mixtures import assert_windows_alike


def test_windows_are_hugging_faces(tmp_path: Path) -> None:
    assert assert_windows_alike(tmp_path / "typed", "ministral") == (None, 7)
    assert assert_windows_alike(tmp_path / "all", "ministral", layer_types=None) == (7, 7)
