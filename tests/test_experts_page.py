"""docs/experts.md as it stands: its commands run, and the schedule it shows is the one they print."""

from __future__ import annotations

import json
import re
from pathlib import Path

from efflaunch.tests.pages import DOCS, run_page


def test_experts_page(tmp_path: Path) -> None:
    printed = run_page("experts.md", tmp_path)
    (shown,) = re.findall(r"^```text\n(.*?)^```$", (DOCS / "experts.md").read_text(), re.DOTALL | re.MULTILINE)
    assert shown in printed
    assert "fsmoe: the whole batch" in printed and "calibrated under_a_bound: 0" in printed
    work = tmp_path / "work"
    assert (work / "ours.svg").read_text().startswith("<?xml")
    assert len(json.loads((work / "experts.json").read_text())["rows"]) == 8
    assert json.loads((work / "throttled.json").read_text())["rows"]
