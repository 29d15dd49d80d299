"""What a Qwen2-MoE config.json says: its windows as Hugging Face's masks have them, and both names of the number of experts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from efflaunch.tests.model.mixtures import assert_either_name, assert_windows_alike

SLIDES = {"use_sliding_window": True, "sliding_window": 9, "num_hidden_layers": 4}
WINDOWS: dict[str, tuple[dict[str, Any], tuple[int | None, ...]]] = {
    "switched off": ({"sliding_window": 9}, (None, None)),
    "every other of the first three": ({**SLIDES, "max_window_layers": 3}, (9, None, 9, None)),
    "of the first alone": ({**SLIDES, "max_window_layers": 1}, (9, None, None, None)),
    "listed": ({**SLIDES, "layer_types": ["full_attention", "sliding_attention"] * 2}, (None, 9, None, 9)),
}


@pytest.mark.parametrize("name", WINDOWS)
def test_windows_are_hugging_faces(tmp_path: Path, name: str) -> None:
    changes, expected = WINDOWS[name]
    assert assert_windows_alike(tmp_path, "qwen2_moe", **changes) == expected


def test_experts_are_counted_under_either_name(tmp_path: Path) -> None:
    assert_either_name(tmp_path, "qwen2_moe", "num_experts", "num_local_experts")
