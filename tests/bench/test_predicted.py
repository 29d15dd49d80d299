"""The predicted-against-measured benchmark on one small configuration, and its section of the report."""

from __future__ import annotations

import json
from pathlib import Path

from efflaunch.bench import predicted, report


def test_one_configuration_and_its_report(tmp_path: Path) -> None:
    assert predicted.main(["--json", str(tmp_path / "results" / "predicted.json"), "--only", "recompute, few tokens"]) == 0
    result = json.loads((tmp_path / "results" / "predicted.json").read_text())
    (row,) = result["rows"]
    assert row["name"] == "recompute, few tokens" and abs(row["predicted_bytes"] / row["measured_bytes"] - 1.0) < 0.01
    assert report.main([str(tmp_path / "results"), str(tmp_path / "page.md")]) == 0
    assert "| recompute, few tokens | 1 | 64 | float32 |" in (tmp_path / "page.md").read_text()


def test_headline_figures() -> None:
    rows = [{"predicted_bytes": predicted_bytes, "measured_bytes": 100} for predicted_bytes in (103, 99, 100)]
    results = predicted.summary(rows)
    assert [round(value, 6) for value in results.values()] == [0.03, 0.01, 0.013333]
