"""The section of pipelines: every schedule, what does not fit, and what has not been measured."""

from __future__ import annotations

from typing import Any

from efflaunch.bench.report_pipeline import pipeline


def row(schedule: str, virtual: int, slices: int, **outcome: Any) -> dict[str, Any]:
    return {"tokens": 512 << 10, "stages": 4, "schedule": schedule, "virtual_stages": virtual, "slices": slices, **outcome}


RESULT = {
    "predicted_vs_measured": None,
    "vs_torch_equal": None,
    "vs_torch_padded": None,
    "published": {"Seq1F1B": "1.14 x"},
    "summary": {"512K: fastest": "1f1b"},
    "simulated": {
        "gpipe_table": [
            {"stages": 2, "micro_batches": 4, "throughput": 1.6, "bubble": 0.2, "published_amoebanet": 1.07, "published_transformer": 1.7}
        ],
        "long_context": [
            row("sliced_1f1b", 1, 4, fits=True, step_s=120.4, bubble=0.05, peak_gib=40.2, recompute={"none": 4}),
            row("1f1b", 1, 1, fits=True, step_s=150.0, bubble=0.25, peak_gib=60.0, recompute={"linear": 2, "none": 2}),
            row("zbv", 2, 1, fits=False, reason="too much"),
        ],
        "search": [{"batch": "equal", "stages": 16, "micro_batches": 64, "search_s": 0.95, "kept": "1f1b", "gap": 0.185, "tried": 10}],
    },
}


def test_every_row_is_there() -> None:
    lines = pipeline(RESULT)
    assert "| 4 | 1.60 / 1.7 / 1.07 |" in lines
    table = lines[lines.index("| schedule | 4 stages |") + 2 :]
    assert table[:3] == ["| 1F1B | 150 / 25% / 60 * |", "| ZBV | does not fit |", "| 1F1B of slices, 4 | 120 / 5% / 40 |"]
    assert "- Seq1F1B: 1.14 x" in lines and "- 512K: fastest: 1f1b" in lines
    assert any("0.95 s of processor (aim: below 2), 10 candidates, kept 1f1b, 18% above the lower bound" in line for line in lines)


def test_what_was_not_measured_is_said() -> None:
    assert "Nothing ran: `predicted_vs_measured`, `vs_torch_equal`, `vs_torch_padded` are empty." in pipeline(RESULT)
    slept = {"ranks": 4, "micro_batches": 8, "worst_error": 0.018, "aim": 0.05}
    slept["rows"] = [{"order": "1f1b", "predicted_s": 1.7, "measured_s": 1.71}]  # type: ignore[assignment]
    ran = {"predicted_vs_measured": slept, "vs_torch_equal": {"speed_over_torch": 1.1}, "vs_torch_padded": {"speed_over_torch": 1.8}}
    lines = pipeline({**RESULT, **ran})
    assert not any("Nothing ran" in line for line in lines)
    assert any("worst error 1.8%" in line and "1f1b 1.70 / 1.71" in line for line in lines)
    assert any("1.10 x with equal" in line and "1.80 x with long-tailed" in line for line in lines)
