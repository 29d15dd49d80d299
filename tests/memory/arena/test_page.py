"""docs/arena.md as it stands."""

from __future__ import annotations

import json
from pathlib import Path

from efflaunch.tests.pages import run_page


def test_arena_page(tmp_path: Path) -> None:
    printed = run_page("arena.md", tmp_path)
    assert "arena of 7.0 KiB for 4 allocations, the least there is" in printed
    result = json.loads((tmp_path / "work" / "arena.json").read_text())
    assert result["benchmark"] == "arena" and result["instances"][0]["ratio"] == 1.0
