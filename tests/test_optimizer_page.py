"""docs/optimizer.md as it stands, and that what it calls exact is: the same losses wherever the states are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from efflaunch.tests.pages import run_page


def events(run: Path, kind: str) -> list[dict[str, Any]]:
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [event for event in map(json.loads, lines) if event["event"] == kind]


def test_optimizer_page(tmp_path: Path) -> None:
    printed = run_page("optimizer.md", tmp_path)
    runs = tmp_path / "work" / "runs"
    host, two, small = (events(runs / name, "step") for name in ("host", "two", "small"))
    assert [event["step"] for event in host] == [1, 2, 3]
    assert [event["loss"] for event in two] == [event["loss"] for event in host[:2]]
    assert [event["grad_norm"] for event in two] == [event["grad_norm"] for event in host[:2]]
    assert small[0]["loss"] == host[0]["loss"] and small[2]["loss"] != host[2]["loss"]
    first, resumed = events(runs / "host", "start")
    assert "host memory" in first["optimizer"] and "device memory" in resumed["optimizer"]
    assert events(runs / "small", "start")[0]["optimizer_inexact"]
    assert "NOT EXACT: moments are rounded to 8bit" in printed
    assert "note: not exact: gradients are clipped by the norm of the step before" in " ".join(printed.split())


def test_muon_page(tmp_path: Path) -> None:
    printed = run_page("muon.md", tmp_path)
    run = tmp_path / "work" / "runs" / "muon"
    assert [event["step"] for event in events(run, "step")] == [1, 2]
    assert events(run, "start")[0]["optimizer"].startswith("Muon for matrices of decoder layers, AdamW for the rest")
    assert "matrices, whole" in printed and "Newton-Schulz takes" in printed
