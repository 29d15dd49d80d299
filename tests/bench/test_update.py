"""The update benchmark on a small model, and its section of the report."""

from __future__ import annotations

import json
from pathlib import Path

from efflaunch.bench import report, update


def test_every_residency_is_measured_and_shown(tmp_path: Path) -> None:
    file = tmp_path / "results" / "update.json"
    small = ["model.num_layers=2", "model.hidden_size=64", "model.intermediate_size=128", "model.vocab_size=512", "data.vocab_size=512"]
    assert update.main(["--json", str(file), "--rounds", "1", *small]) == 0
    result = json.loads(file.read_text())
    assert [row["name"] for row in result["rows"]] == list(update.CASES)
    assert all(row["predicted_s"] > 0 and row["pass_s"] > 0 for row in result["rows"])
    assert result["worst_error"] == max(abs(row["ratio"] - 1.0) for row in result["rows"])
    assert report.main([str(tmp_path / "results"), str(tmp_path / "page.md")]) == 0
    assert "| on the host, in backward |" in (tmp_path / "page.md").read_text()
