"""The section of expert schedules: every scheduler, aims, and that it is simulated."""

from __future__ import annotations

from typing import Any

from efflaunch.bench.experts import OURS, PEERS, TARGETS
from efflaunch.bench.report_experts import experts, experts_throttled


def figures(over: float) -> dict[str, Any]:
    schedulers = {
        name: {"over_tutel": over + index / 100, "times_whole_lower": 1.25, "times_lower": 1.5}
        for index, name in enumerate((*PEERS, *OURS))
    }
    means = {f"mean_over_{peer}{suffix}": over for peer in ("tutel", "fsmoe", "flowmoe") for suffix in ("", "_whole")}
    least = {"least_over_fsmoe": 1.0, "least_over_flowmoe": 1.001, "under_a_bound": 0, "plan_s_p50": 0.0071, "layers": 5}
    return {**means, **least, "schedulers": schedulers}


def test_every_scheduler_and_both_kinds_of_contention() -> None:
    result = {"layers": 4, "targets": TARGETS}
    for contention, over in (("calibrated", 1.26), ("ideal", 1.45)):
        result[contention] = {**figures(over), "A": figures(over), "B": figures(over + 0.5)}
    lines = experts(result)
    assert any("Simulated, not measured" in line for line in lines)
    table = [line for line in lines if line.startswith("| ")]
    assert table[0] == "| schedule | calibrated A | calibrated B | ideal A | ideal B |" and len(table) == 1 + len(PEERS) + len(OURS)
    assert table[1].endswith("| 1.260 / 1.250 / 1.500 | 1.760 / 1.250 / 1.500 | 1.450 / 1.250 / 1.500 | 1.950 / 1.250 / 1.500 |")
    (calibrated,) = [line for line in lines if line.startswith("- calibrated")]
    assert "mean_over_tutel 1.260** (aim 1.25)" in calibrated and "7.1 ms" in calibrated


def test_a_testbed_that_was_left_out_has_no_column() -> None:
    result = {"layers": 4, "targets": TARGETS}
    for contention in ("calibrated", "ideal"):
        result[contention] = {**figures(1.3), "B": figures(1.3)}
    assert "| schedule | calibrated B | ideal B |" in experts(result)


def test_schedules_on_throttled_links() -> None:
    rows = [{"schedule": "fsmoe", "tasks": 44, "predicted_s": 2.0, "measured_s": 2.1}]
    result = {"ranks": 2, "layers": 1, "scale": 20.0, "rounds": 3, "aim": 0.07, "rows": rows, "worst_error": 0.05}
    lines = experts_throttled({**result, "inverted_pairs": []})
    assert "| FSMoE | 44 | 2.00 | 2.10 | 1.050 |" in lines and any("worst_error 5.0%** (aim 7% or less)" in line for line in lines)
    assert any("than predicted: none." in line for line in lines)
    assert any("tutel / fsmoe" in line for line in experts_throttled({**result, "inverted_pairs": [["tutel", "fsmoe"]]}))
