"""The sections that run other programs."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from efflaunch.bench import first_gpu_runs as runs
from efflaunch.bench.gpu_section import Scale


@pytest.mark.slow
def test_the_executors_benchmark_in_small(tmp_path: Path) -> None:
    found = runs.memory(Scale("cpu", True, tmp_path, 600.0))
    assert found["errors"] == [] and [row["tokens"] for row in found["summary"]["lengths"]] == [48]


@pytest.mark.slow
def test_four_steps_with_a_resume_in_every_configuration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also those that `--tiny` leaves out."""
    monkeypatch.setattr(runs, "TINY", tuple(runs.CONFIGURATIONS))
    found = runs.trainer(Scale("cpu", True, tmp_path, 600.0))
    assert found["failed"] == {} and found["ok"] and set(found["losses"]) == set(runs.CONFIGURATIONS)
    assert all(apart < 1e-2 for apart in found["from_default"].values())


def test_a_configuration_that_fails_costs_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def command(folder: Path, *words: str) -> None:
        asked.append((folder.name, words[0], words[-1]))
        if folder.name == "compiled":
            raise subprocess.CalledProcessError(93, words, output="", stderr="no compiler")
        steps = 2 if words[0] == "train" else 4
        (folder / "runs" / "run").mkdir(parents=True, exist_ok=True)
        lines = [json.dumps({"event": "step", "step": step, "loss": 1.0 / step}) for step in range(1, steps + 1)]
        (folder / "runs" / "run" / "metrics.jsonl").write_text("\n".join(['{"event": "start"}', *lines]))

    monkeypatch.setattr(runs, "_command", command)
    found = runs.trainer(Scale("cuda", False, tmp_path, 600.0))
    assert found["failed"] == {"compiled": "no compiler"} and not found["ok"]
    assert found["losses"] == {name: [1.0, 0.5, 1 / 3, 0.25] for name in runs.CONFIGURATIONS if name != "compiled"}
    assert set(found["from_default"].values()) == {0.0}
    assert asked[:2] == [("default", "train", "train.steps=2"), ("default", "resume", "train.steps=4")]
