"""The benchmark of adapters in miniature: peft's gradients, an order of bytes that always holds, and its section of the report."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from efflaunch.bench import adapters, report
from efflaunch.bench.peers.ours import preset, with_chunks
from efflaunch.bench.report_adapters import NAMES

CHUNK = 16


def test_everyone_is_measured_and_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("peft")
    solved = {name: with_chunks(preset(kind), CHUNK) for name, kind in (("lora", "streambp"), ("auto", "alst"), ("auto_with_room", "keep"))}
    monkeypatch.setattr(adapters, "policies", lambda task, chunk_tokens: solved)
    file = tmp_path / "results" / "adapters.json"
    small = ["--shape", "4x8", "--layers", "2", "--lengths", "48", "80", "--chunk", str(CHUNK), "--time-tokens", "48", "--rounds", "1"]
    assert adapters.main(["--json", str(file), *small]) == 0
    result = json.loads(file.read_text())
    slope = {name: row["bytes_per_token"] for name, row in result["rows"].items()}
    assert set(slope) == set(NAMES) == set(result["time_ratio"]) and 0 < result["gradient_error"] < 1e-4
    assert result["bytes_ratio"] == slope["lora_auto"] / slope[adapters.BASE] < 1 < slope["lora_auto_with_room"] / slope["lora_auto"]
    packed, plain = (result["rows"][name]["device_bytes"][0] for name in ("qlora_auto", "lora_auto"))
    assert packed < plain, "matrices of 4 bits a number"
    assert report.main([str(tmp_path / "results"), str(tmp_path / "page.md")]) == 0
    assert "| QLoRA, auto where everything is full |" in (tmp_path / "page.md").read_text()
