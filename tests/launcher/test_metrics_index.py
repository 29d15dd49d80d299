"""Where a run stands, from long metrics: the same as from all of them, without parsing or reading all of them each time."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from efflaunch.launcher.rundir import metrics_index
from efflaunch.launcher.rundir.metrics_index import INDEX_FILE, newest_step, read_summary, step_events
from efflaunch.launcher.rundir.metrics_reader import MetricsFollower
from efflaunch.launcher.rundir.progress import RunProgress, summary_lines
from efflaunch.launcher.stop_forecast import GraceWatch


def step(number: int, ranks: int = 4) -> dict[str, Any]:
    rows = [{"rank": rank, "tokens": 70, "peak_bytes": number << 20, "own_s": 0.5} for rank in range(ranks)]
    numbers = {"tokens_per_s": 50.0, "lr": 1e-3, "grad_norm": 0.5, "total_tokens": 100 * number, "plan": "[0+2: 3 seq]"}
    return {
        "event": "step",
        "time": 1.0 * number,
        "step": number,
        "loss": 10.0 / number,
        "step_s": 0.25 + number / 1000,
        "ranks": rows,
        **numbers,
    }


def start(first: int, resumed_from: int | None = None) -> dict[str, Any]:
    return {
        "event": "start",
        "step": first,
        "steps": 1000,
        "world_size": 4,
        "parameters": 5,
        "resumed_from": resumed_from,
        "memory": ["keep"],
    }


def append(run_dir: Path, *events: dict[str, Any]) -> None:
    with (run_dir / "metrics.jsonl").open("a") as file:
        file.write("".join(json.dumps(event) + "\n" for event in events))


def write_run(run_dir: Path) -> None:
    """Two starts; the second takes steps 41 to 60 again, and one step has no loss."""
    append(run_dir, start(0), *map(step, range(1, 41)), {"event": "checkpoint", "step": 40, "path": "x", "save_s": 2.0, "stall_s": 0.1})
    append(run_dir, *map(step, range(41, 61)), start(40, resumed_from=40), {**step(41), "loss": None}, *map(step, range(42, 51)))
    append(run_dir, {"event": "mirror_failed", "step": 40, "error": "away"})


def check_same(run_dir: Path) -> int:
    """The summary tells what all events tell; bytes read."""
    everything, summary = MetricsFollower(run_dir).read(), read_summary(run_dir)
    slow, quick = RunProgress().apply(everything), summary.progress()
    assert (quick.losses, quick.durations, quick.last, quick.total_tokens) == (slow.losses, slow.durations, slow.last, slow.total_tokens)
    assert summary_lines(quick) == summary_lines(slow) and quick.peak_bytes == slow.peak_bytes and quick.mirror_error == slow.mirror_error
    assert summary.forecast(60.0) == GraceWatch(60.0).add(everything).forecast
    assert summary.newest_step() == 60
    return summary.bytes_read


def test_a_summary_is_what_all_events_tell(tmp_path: Path) -> None:
    assert read_summary(tmp_path).events == [] and newest_step(tmp_path) == 0 and step_events(tmp_path, None) == []
    write_run(tmp_path)
    assert check_same(tmp_path) == (tmp_path / "metrics.jsonl").stat().st_size
    assert not (tmp_path / INDEX_FILE).exists(), "nothing is kept of a file that is read at once"


def test_what_was_read_is_not_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics_index, "_LEAST_BYTES", 1)
    write_run(tmp_path)
    size = check_same(tmp_path)
    assert (tmp_path / INDEX_FILE).is_file() and check_same(tmp_path) < size / 20
    append(tmp_path, step(51), step(52))
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"event": "step", "step": 53, "lo')
    assert check_same(tmp_path) < size / 10
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write("\n")
    append(tmp_path, start(52, resumed_from=40), *map(step, range(41, 45)))
    assert check_same(tmp_path) < size / 5
    assert check_same(tmp_path) < size / 20


@pytest.mark.parametrize("damage", ["other metrics", "no json", "another format", "longer than the metrics", "not a mapping"])
def test_an_index_that_does_not_fit_is_made_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str) -> None:
    monkeypatch.setattr(metrics_index, "_LEAST_BYTES", 1)
    write_run(tmp_path)
    check_same(tmp_path)
    index = tmp_path / INDEX_FILE
    value = json.loads(index.read_text())
    if damage == "other metrics":
        text = (tmp_path / "metrics.jsonl").read_text()
        (tmp_path / "metrics.jsonl").write_text(text.replace('"parameters": 5', '"parameters": 6', 1))
    texts = {"no json": "{", "not a mapping": "[]", "another format": json.dumps({**value, "format": 0})}
    texts["longer than the metrics"] = json.dumps({**value, "offset": 1 << 40})
    index.write_text(texts.get(damage, index.read_text()))
    assert check_same(tmp_path) == (tmp_path / "metrics.jsonl").stat().st_size
    assert check_same(tmp_path) < 2000


def test_a_folder_that_cannot_be_written_needs_no_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object) -> None:
        raise PermissionError("read only")

    monkeypatch.setattr(metrics_index, "_LEAST_BYTES", 1)
    monkeypatch.setattr(metrics_index, "write_atomic", refuse)
    write_run(tmp_path)
    check_same(tmp_path)
    assert not (tmp_path / INDEX_FILE).exists()


def test_one_step_of_many(tmp_path: Path) -> None:
    write_run(tmp_path)
    events = step_events(tmp_path, 45)
    assert [event["event"] for event in events] == ["start", "checkpoint", "step", "start", "step", "mirror_failed"]
    assert events[2] == step(45) == events[4]
    assert [event["step"] for event in step_events(tmp_path, None) if event["event"] == "step"] == [60]


def test_memory_holds_little_of_a_step(tmp_path: Path) -> None:
    """64 ranks make lines of 5 KB; what is kept of each step but the last is three numbers."""
    append(tmp_path, start(0), *(step(number, ranks=64) for number in range(1, 101)))
    events = read_summary(tmp_path).events
    assert all(set(event) == {"event", "step", "loss", "step_s"} for event in events[1:-1]) and len(events[-1]["ranks"]) == 64


def test_escapes_in_metrics_reach_nobody(tmp_path: Path) -> None:
    append(tmp_path, {"event": "checkpoint_failed", "step": 1, "error": "\x1b]0;evil\x07 disk"}, {**step(1), "plan": "caf\u00e9\x1b[2J"})
    assert read_summary(tmp_path).progress().checkpoint_error == "\\x1b]0;evil\\x07 disk"
    assert MetricsFollower(tmp_path).read()[1]["plan"] == "caf\u00e9\\x1b[2J"
