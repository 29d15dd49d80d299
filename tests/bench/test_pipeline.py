"""The simulated benchmark of pipelines, end to end on few stages."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from efflaunch.bench.pipeline import TABLE, gpipe_table, main, search, summary
from efflaunch.bench.report import section


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    file = tmp_path_factory.mktemp("pipeline") / "r.json"
    assert main(["--json", str(file), "--lengths", str(512 << 10), "--stages", "4", "--search", "4/8", "--ranks", "0"]) == 0
    read: dict[str, Any] = json.loads(file.read_text())
    return read


def test_long_sequences_have_every_schedule(result: dict[str, Any]) -> None:
    rows = result["simulated"]["long_context"]
    assert {row["schedule"] for row in rows} == {
        *("gpipe", "1f1b", "zero_bubble", "interleaved", "zbv", "dual_pipe_v", "sliced_1f1b", "sliced interleaved")
    }
    by_key = {(row["schedule"], row["slices"]): row for row in rows}
    whole, sliced = by_key["1f1b", 1], by_key["sliced_1f1b", 4]
    assert whole["fits"] and sliced["fits"] and sliced["step_s"] < whole["step_s"] and sliced["bubble"] < whole["bubble"]
    assert all(0 < row["useful_share"] < 1 and row["peak_gib"] < 80 for row in rows if row["fits"])
    assert all(row["reason"] for row in rows if not row["fits"])


def test_what_needs_ranks_is_left_empty(result: dict[str, Any]) -> None:
    assert [result[key] for key in ("predicted_vs_measured", "vs_torch_equal", "vs_torch_padded")] == [None] * 3
    assert result["summary"] == summary(result["simulated"]["long_context"])
    assert result["summary"]["512K: slices over whole micro-batches"] > 1
    assert "## Schedules of pipelines, simulated" in section(result)


def test_gpipe_s_table_has_the_shape_of_the_published_one() -> None:
    rows = gpipe_table()
    assert len(rows) == sum(map(len, TABLE.values()))
    for row in rows:
        ideal = row["micro_batches"] * row["stages"] / (row["micro_batches"] + row["stages"] - 1)
        # Re-materialisation changes every cell alike.
        assert row["throughput"] == pytest.approx(ideal) and row["bubble"] == pytest.approx(1 - ideal / row["stages"])
        if row["micro_batches"] == 32:
            assert row["throughput"] == pytest.approx(row["published_transformer"], rel=0.1)


def test_the_search_is_of_equal_and_unequal_micro_batches(result: dict[str, Any]) -> None:
    found = result["simulated"]["search"]
    assert [row["batch"] for row in found] == ["equal", "long tail"] and all(row["search_s"] > 0 and row["gap"] >= 0 for row in found)
    assert [row["kept"] for row in search(4, 8)] == [row["kept"] for row in found]


@pytest.mark.parametrize("words", [["--search", "4"], ["--search", "0/4"], ["--stages", "3"], ["--lengths", "0"]])
def test_wrong_words_are_named(words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--json", str(tmp_path / "r.json"), *words])
    assert words[0] in capsys.readouterr().err
