"""Pages of docs/ as they stand: what they say happens, happens."""

from __future__ import annotations

import json
from pathlib import Path

from efflaunch.tests.pages import run_page


def test_runs_page(tmp_path: Path) -> None:
    printed = run_page("runs.md", tmp_path)
    run = tmp_path / "work" / "runs" / "demo"
    events = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [event["step"] for event in events if event["event"] == "step"] == list(range(1, 11))
    there = {path.name for path in run.iterdir()}
    assert {"run.yaml", "run.sha256", "revisions", "metrics.jsonl", "logs", "checkpoints", "state.json"} <= there
    for exported in ("exported", "exported-float32"):
        assert (tmp_path / "work" / exported / "model.safetensors").is_file()
    assert "train.steps: 6 -> 8" in printed and "schedule kept as it was, over 6 steps" in printed
    assert "schedule begun anew" in printed


def test_launching_page(tmp_path: Path) -> None:
    printed = run_page("launching.md", tmp_path)
    assert "step 4 of 4" in printed or "4/4" in printed or "steps       4" in printed
    assert (tmp_path / "work" / "runs" / "first").stat().st_mode & 0o777 == 0o700


def test_evaluation_page(tmp_path: Path) -> None:
    printed = run_page("evaluation.md", tmp_path)
    work = tmp_path / "work"
    events = [json.loads(line) for line in (work / "runs" / "judged" / "metrics.jsonl").read_text().splitlines()]
    assert [event["step"] for event in events if event["event"] == "eval"] == [2, 4]
    last = [event for event in events if event["event"] == "eval"][-1]
    assert f"numbers: loss {last['loss']:.4f} over {last['targets']:,} targets" in printed
    assert "  many_values      512  exact: " in printed and "% at 0.25, " in printed
    assert '"length": 64' in printed and "best eval/numbers/loss so far" in printed


def test_report_page(tmp_path: Path) -> None:
    printed = run_page("report.md", tmp_path)
    assert (tmp_path / "work" / "first.html").read_text().startswith("<!DOCTYPE html>")
    assert "wrote first.html" in printed and '"optim.lr": [' in printed


def test_mixes_page(tmp_path: Path) -> None:
    printed = run_page("mixes.md", tmp_path)
    run = tmp_path / "work" / "runs" / "mixed"
    steps = [event for event in map(json.loads, (run / "metrics.jsonl").read_text().splitlines()) if event["event"] == "step"]
    assert [len(event["sources"]) for event in steps] == [2] * 6
    assert "data.sources from step 5 on: books 60.0 % of the tokens, notes 40.0 %" in printed
    staged = map(json.loads, (run.parent / "staged" / "metrics.jsonl").read_text().splitlines())
    assert [event["train_stage"] for event in staged if event["event"] == "step"] == [1, 1, 2, 2]
    assert "books: loss" in printed and "sequences up to 512K, 8M tokens a step" in printed


def test_memory_page(tmp_path: Path) -> None:
    printed = run_page("memory.md", tmp_path)
    assert "memory policy streambp: layer inputs kept on the GPU" in printed and "memory policy auto: " in printed


def test_slurm_page(tmp_path: Path) -> None:
    printed = run_page("slurm.md", tmp_path)
    assert "#SBATCH --nodes=" in printed and "run_dir=/shared/runs/big\n" in printed


def test_ray_page(tmp_path: Path) -> None:
    printed = run_page("ray.md", tmp_path)
    assert "# to http://head:8265" in printed and "efflaunch.launcher.ray.driver /shared/runs/big --work-dir" in printed


def test_checkpoints_page(tmp_path: Path) -> None:
    printed = run_page("checkpoints.md", tmp_path)
    assert "training waited" in printed and "verified" in printed and "pinned" in printed and "damaged" not in printed
    assert "tensors, for example" in printed
    work = tmp_path / "work"
    names = {path.name for path in (work / "runs" / "demo" / "checkpoints").iterdir()}
    assert names == {"step-00000012", "step-00000014"}
    assert (work / "exported" / "model.safetensors").is_file() and (work / "elsewhere" / "step-00000014" / "COMMIT").is_file()
