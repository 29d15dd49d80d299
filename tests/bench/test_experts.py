"""The sweep of expert schedules end to end on a few layers, and what `--show` prints."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from efflaunch.bench.experts import OURS, PEERS, main, summary

ROWS = 3


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    file = tmp_path_factory.mktemp("experts") / "r.json"
    assert main(["--json", str(file), "--sample", str(ROWS), "--layers", "2"]) == 0
    return json.loads(file.read_text())


def test_every_row_compares_every_scheduler(result: dict[str, object]) -> None:
    rows = result["rows"]
    assert result["benchmark"] == "experts" and isinstance(rows, list)
    assert [row["testbed"] for row in rows] == ["A"] * ROWS + ["B"] * ROWS
    for row in rows:
        for contention in ("calibrated", "ideal"):
            found = row[contention]
            seconds = found["seconds"]
            assert list(seconds) == [*PEERS, *OURS]
            assert seconds["ours"] == min(seconds.values()) and seconds["ours"] <= seconds["ours_whole"]
            assert 0 < found["lower_s"] <= seconds["ours"] and found["whole_lower_s"] <= seconds["ours_whole"] * (1 + 1e-9)
            assert found["parts"] == 1 or row["batch"] % found["parts"] == 0


def test_the_summary_is_of_the_rows(result: dict[str, object]) -> None:
    rows = result["rows"]
    assert isinstance(rows, list)
    assert {key: result[key] for key in ("calibrated", "ideal")} == json.loads(json.dumps(summary(rows)))
    for contention in ("calibrated", "ideal"):
        found = result[contention]
        over = [row[contention]["seconds"]["fsmoe"] / row[contention]["seconds"]["ours"] for row in rows]
        assert isinstance(found, dict) and found["layers"] == 2 * ROWS and found["A"]["layers"] == found["B"]["layers"] == ROWS
        assert found["least_over_fsmoe"] == pytest.approx(min(over)) and found["mean_over_fsmoe"] == pytest.approx(sum(over) / len(over))
        assert found["least_over_fsmoe"] >= 1 and found["least_over_flowmoe"] >= 1 and found["under_a_bound"] == 0
        assert set(found["schedulers"]) == {*PEERS, *OURS} and found["schedulers"]["tutel"]["over_tutel"] == 1


def test_a_schedule_that_is_faster_than_a_bound_is_counted(result: dict[str, object]) -> None:
    rows = json.loads(json.dumps(result["rows"]))
    rows[0]["ideal"]["lower_s"] = rows[0]["ideal"]["seconds"]["ours"] * 1.0001
    counted = summary(rows)
    assert counted["ideal"]["under_a_bound"] >= 1 and counted["calibrated"]["under_a_bound"] == 0


def test_two_processes_give_the_same_rows(result: dict[str, object], tmp_path: Path) -> None:
    main(["--json", str(tmp_path / "r.json"), "--sample", str(ROWS), "--layers", "2", "--processes", "2"])
    again = json.loads((tmp_path / "r.json").read_text())["rows"]
    rows = result["rows"]
    assert isinstance(rows, list)
    for one, other in zip(rows, again, strict=True):
        for contention in ("calibrated", "ideal"):
            assert one[contention]["seconds"] == other[contention]["seconds"]


def test_show_prints_and_draws_one_schedule(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture = tmp_path / "fsmoe.svg"
    assert (
        main(["--show", "testbed=A", "schedule=fsmoe", "batch=4", "tokens=512", "capacity=2.4", "--layers", "2", "--out", str(picture)])
        == 0
    )
    printed = capsys.readouterr().out
    assert "fsmoe: the whole batch" in printed and "inter-node |" in printed and "reduction of gradients" in printed
    assert "experts" in picture.read_text()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "--json FILE or --show is needed"),
        (["--json", "r.json", "--layers", "0"], "'0' is no count of 1 or more"),
        (["--show", "speed=3"], "speed=3"),
        (["--show", "batch=0"], "batch=0"),
        (["--show", "capacity=inf"], "capacity=inf"),
        (["--show", "testbed=C"], "expected A, B"),
        (["--show", "schedule=best"], "expected ours"),
        (["--show", "--layers", "1", "--out", "x.gif"], "ends in .svg"),
    ],
    ids=["nothing", "layers", "key", "zero", "infinite", "testbed", "schedule", "ending"],
)
def test_wrong_words_are_named(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(words)
    assert ended.value.code == 2 and message in capsys.readouterr().err
