"""docs/expert_schedules.md as it stands: its commands run, and the schedule it shows is the one they print."""

from __future__ import annotations

import json
import re
from pathlib import Path

from efflaunch.tests.pages import DOCS, run_page


def test_experts_page(tmp_path: Path) -> None:
    printed = run_page("expert_schedules.md", tmp_path)
    (shown,) = re.findall(r"^```text\n(.*?)^```$", (DOCS / "expert_schedules.md").read_text(), re.DOTALL | re.MULTILINE)
    assert shown in printed
    assert "fsmoe: the whole batch" in printed and "calibrated under_a_bound: 0" in printed
    work = tmp_path / "work"
    assert (work / "ours.svg").read_text().startswith("<?xml")
    assert len(json.loads((work / "experts.json").read_text())["rows"]) == 8
    assert json.loads((work / "throttled.json").read_text())["rows"]


def test_the_page_of_training_runs(tmp_path: Path) -> None:
    printed = run_page("experts.md", tmp_path)
    assert "128 a layer, 8 of them a token; 8 ranks share them" in printed and "16 a layer, 2 of them a token" in printed
    assert "128 a layer in 61 of 62, 6 of them a token; 32 ranks share them" in printed
    assert "which is taken to get 1.5 times the mean" in " ".join(printed.split())
