"""The section of published runs: a line each, and what no figure is made of."""

from __future__ import annotations

from efflaunch.bench.published import AIMS, MEMO, RUNS, limit_row, row, summary
from efflaunch.bench.report_published import published


def test_a_line_for_each_run_with_its_source() -> None:
    rows = [row(run) for run in RUNS if run.is_draft and run.memory_bytes is not None]
    lines = published({"rows": rows, "aims": AIMS, **summary(rows)})
    table = [line for line in lines if line.startswith("| [")]
    assert len(table) == 2 and all("(draft)" in line and "/pull/6845" in line for line in table)
    assert "| 8 | cudnn | 1,295 |" in table[0] and "| 60.8 |" in table[0] and "| 483 |" in table[1]
    assert any("Time: nothing published; memory: nothing published (aims: median 10%, worst 25%)." in line for line in lines)
    assert sum(line.startswith("- not said by") for line in lines) == 1


def test_what_was_not_published_is_a_dash() -> None:
    rows = [row(RUNS[-1])]
    lines = published({"rows": rows, "limits": [limit_row(MEMO)], "aims": AIMS, **summary(rows)})
    assert any(line.startswith("| [7B, 1M, MEMO](https://arxiv.org/abs/2407.12117) | 8 | ") and "| 52% |" in line for line in lines)
    assert any("1 of 1 fit by our ledger" in line for line in lines) and any("2407.12117: seconds and GB" in line for line in lines)
    assert any(" | - | " in line for line in lines) and any("Time: nothing published; memory: **median" in line for line in lines)
