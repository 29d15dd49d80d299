"""The arena benchmark on models cut to one layer."""

from __future__ import annotations

import json
from pathlib import Path

from efflaunch.bench import arena
from efflaunch.bench.report import section
from efflaunch.tests.limits import ENDS_S


def test_own_traces_and_a_file(tmp_path: Path) -> None:
    (tmp_path / "two.csv").write_text("id,lower,upper,size\n1,0,2,5\n2,1,3,7\n")
    out = tmp_path / "arena.json"
    assert arena.main(["--json", str(out), "--layers", "1", "--seconds", str(ENDS_S), "--own", "2", str(tmp_path / "two.csv")]) == 0
    result = json.loads(out.read_text())
    assert len(result["rows"]) == 2 and result["worst_ratio"] <= 1.01
    for row in result["rows"]:
        assert row["height_bytes"] >= row["max_live_bytes"] > 2**30 and row["allocations"] > 100
        assert row["simulated_ratio"]["caching"] >= row["ratio"] - 1e-9
    assert result["instances"][0]["height_bytes"] == result["instances"][0]["max_live_bytes"] == 12
    text = section(result)
    assert "## Arena plans" in text and "two.csv" in text and "simulated" in text


def test_there_are_enough_own_settings() -> None:
    assert len(arena.own_traces(1)) >= 6
