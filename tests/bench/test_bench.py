"""The benchmark programs run in miniature and write what the report reads. Nothing is timed here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from efflaunch.bench import report, startup, step

TINY: dict[str, Any] = {**step.STEP_MODEL, "vocab_size": 256, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}


@pytest.mark.parametrize("ranks", [1, 2])
def test_contestants_agree_and_our_recompute_holds_less(ranks: int) -> None:
    measured = step.measure((48, 32, 16), ranks=ranks, rounds=2, model=TINY)
    losses = list(measured["losses"].values())
    assert max(losses) == pytest.approx(min(losses), rel=1e-4)
    assert set(measured["losses"]) == {"ours_keep", "ours_recompute", *step.PAIRS["keep"], *step.PAIRS["recompute"]}
    assert measured["peak_bytes"]["ours_recompute"] < measured["peak_bytes"]["ours_keep"]
    assert all(len(times) == 2 for times in measured["seconds"].values())


def test_headline_figures_are_the_worst_case() -> None:
    def row(keep: float, recompute: float, peak: int) -> dict[str, Any]:
        ratios = {"keep": {"stock": 9.0, "varlen": keep}, "recompute": {"stock_checkpointing": 9.0, "varlen_checkpointing": recompute}}
        return {
            "ratios": ratios,
            "processor_ratios": ratios,
            "peak_bytes": {"ours_recompute": peak, "stock_checkpointing": 200, "varlen_checkpointing": 100},
        }

    assert step.summary({"1": row(1.2, 1.1, 50), "2": row(0.99, 1.3, 80)}) == {
        "throughput_ratio": 0.99,
        "processor_ratio": 0.99,
        "peak_ratio": 0.8,
    }


def test_medians_of_ratios_within_a_round() -> None:
    seconds = {"ours_keep": [1.0, 10.0, 1.0], "stock": [2.0, 20.0, 3.0], "varlen": [1.0, 11.0, 1.2]}
    seconds |= {"ours_recompute": [1.0] * 3, "stock_checkpointing": [2.0] * 3, "varlen_checkpointing": [0.5] * 3}
    measured = step._ratios(seconds)
    assert measured["keep"] == {"stock": 2.0, "varlen": 1.1}
    assert measured["recompute"] == {"stock_checkpointing": 2.0, "varlen_checkpointing": 0.5}


def test_startup_writes_its_keys_and_the_report_shows_them(tmp_path: Path) -> None:
    results = tmp_path / "results"
    assert startup.main(["--json", str(results / "startup.json"), "--repeats", "1", "--no-first-step"]) == 0
    measured = json.loads((results / "startup.json").read_text())
    assert measured["help_s"] > 0 and measured["plan_s"] > 0 and "first_step_s" not in measured
    assert measured["command"].startswith("python -m efflaunch.bench.")
    assert report.main([str(results), str(tmp_path / "page.md")]) == 0
    page = (tmp_path / "page.md").read_text()
    assert "## Start-up" in page and f"| {measured['plan_s']:.2f} |" in page and measured["date"] in page


def test_the_report_of_a_step(tmp_path: Path) -> None:
    row = {
        "ratios": {"keep": {"varlen": 1.234}},
        "processor_ratios": {"keep": {"varlen": 1.111}},
        "peak_bytes": {"ours_keep": 3 << 20, "varlen": 6 << 20},
    }
    machine = {"processor": "p", "cores": 2, "system": "s", "load_before": 0.0}
    result = {
        "benchmark": "step", "lengths": [3, 2], "rounds": 5, "ranks": {"1": row}, "machine": machine, "versions": {"torch": "2"},
        "throughput_ratio": 1.234, "processor_ratio": 1.1, "peak_ratio": 0.5, "command": "c", "date": "d",
    }  # fmt: skip
    page = report.page([result])
    assert "| 1 | keep | varlen | 1.234 | 1.111 | 3.0 | 6.0 |" in page and "- command: `c`" in page
    with pytest.raises(SystemExit):
        report.main([str(tmp_path), str(tmp_path / "page.md")])


def test_a_step_line_is_recognised_only_when_whole(tmp_path: Path) -> None:
    metrics = tmp_path / "metrics.jsonl"
    assert not startup.has_step(metrics)
    metrics.write_text('{"event":"start"}\n{"event":"step"')
    assert not startup.has_step(metrics)
    metrics.write_text('{"event":"start"}\n{"event":"step"}\n')
    assert startup.has_step(metrics)


def test_the_report_of_the_planner() -> None:
    row = {"gpus": 64, "sequences": 512, "distribution": "github", "plan_s_p50": 0.1, "plan_cpu_s_p50": 0.05, "plan_s_p99": 0.2}
    row |= {"gap_inline": 0.04, "gap_certificate": None, "speedup_vs_static": 1.5, "speedup_vs_greedy": 1.25, "speedup_vs_flexsp": None}
    other = {**row, "plan_s_p50": 0.3, "plan_s_p99": 0.4, "speedup_vs_flexsp": 1.125}
    origin = {"machine": {"processor": "P", "cores": 2, "system": "S", "load_before": 0.0}, "versions": {}, "command": "c", "date": "d"}
    result = {"benchmark": "planner", "rows": [row, other], "targets": {"x": 1.0}, "cold_plan_s": 0.5, **origin}
    assert "| 64 / 512 | github | 200 ms (50) | 400 ms | 4.0% |  | 1.500 | 1.250 | 1.125 |" in report.page([result])
