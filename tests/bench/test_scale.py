"""The benchmark of long runs in miniature. Nothing is timed here."""

from __future__ import annotations

import json
from pathlib import Path

from efflaunch.bench import report, scale


def test_its_keys_are_what_the_report_shows(tmp_path: Path) -> None:
    words = ["--json", str(tmp_path / "scale.json"), "--steps", "30", "--ranks", "2", "--kept", "1", "3"]
    assert scale.main(words) == 0
    result = json.loads((tmp_path / "scale.json").read_text())
    assert [row["inspected"] for row in result["saves"]] == [2, 2]
    page = report.page([result])
    assert "| checkpoints kept | ms a save | checkpoints looked at |" in page and "30 steps" in page
