"""The program of a lent GPU: sections in processes of their own, a row each as soon as it is there, an end before the lease's."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from efflaunch.bench import first_gpu
from efflaunch.bench.first_gpu import FILE, LIMITS_S, MIN_S, process_row, read_rows, run_all, section
from efflaunch.tests.limits import ENDS_S


class Clock:
    """Time that sections take."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def test_sections_run_in_order_until_too_little_time_is_left(tmp_path: Path) -> None:
    clock, begun, file = Clock(), [], tmp_path / FILE

    def run(name: str, left_s: float) -> dict[str, Any]:
        begun.append((name, left_s))
        assert [row["section"] for row in read_rows(file)] == [each for each, _ in begun[:-1]], "a row is there before the next begins"
        clock.now_s += 100.0
        return {"error": "broken"} if name == "rope" else {"value": 1}

    rows = run_all(list(LIMITS_S), file, 310.0, run, clock)
    assert begun == [("device", 40.0), ("rope", 40.0), ("attention", 90.0)] and 310.0 - clock.now_s < MIN_S
    assert [(row["section"], row["seconds"], row.get("error")) for row in rows] == [
        ("device", 100.0, None), ("rope", 100.0, "broken"), ("attention", 100.0, None),
    ]  # fmt: skip
    with file.open("a") as lines:
        lines.write('{"section": "int32", "cut o')
    assert len(read_rows(file)) == 3, "a line that was cut off is none"


def test_rows_behind_a_line_that_was_cut_off_are_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / FILE
    file.write_text('{"section": "device"}\n{"section": "int32", "cut o')
    for name in ("rope", "int32"):
        run_all([name], file, 100.0, lambda name, left_s: {"value": 1}, Clock())
    assert [row["section"] for row in read_rows(file)] == ["device", "rope", "int32"] and file.read_text().count("\n") == 4
    assert "1 line(s) that were cut off" in capsys.readouterr().err


def test_what_is_in_the_file_is_not_run_again_and_limits_end_at_the_lease(tmp_path: Path) -> None:
    clock, begun = Clock(), []

    def run(name: str, left_s: float) -> dict[str, Any]:
        begun.append((name, left_s))
        clock.now_s += left_s
        return {}

    run_all(["device"], tmp_path / FILE, 100.0, run, clock)
    rows = run_all(["device", "memory", "trainer"], tmp_path / FILE, 100.0, run, clock)
    assert begun == [("device", 40.0), ("memory", 100.0)] and [row["section"] for row in rows] == ["device", "memory"]


def test_a_section_that_fails_or_hangs_is_a_row_with_its_last_words() -> None:
    assert process_row([sys.executable, "-c", "print('noise'); print('{\"a\": 1}')"], ENDS_S) == {"a": 1}
    failing = "import sys; print('last words', file=sys.stderr); sys.exit(3)"
    assert "exit code 3: last words" in process_row([sys.executable, "-c", failing], ENDS_S)["error"]
    assert "exit code 0" in process_row([sys.executable, "-c", ""], ENDS_S)["error"]
    assert "not done after 0 s" in process_row([sys.executable, "-c", "import threading; threading.Event().wait()"], 0.1)["error"]


def test_every_section_is_there() -> None:
    assert {section(name).__name__ for name in LIMITS_S} == set(LIMITS_S)


def test_a_section_by_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [str(tmp_path), "device", "--device", "cpu", "--tiny"]
    assert first_gpu.main(arguments) == 0
    (row,) = read_rows(tmp_path / FILE)
    assert row["section"] == "device" and row["cores"] >= 1 and row["packages"]["hydra"] and row["machine"]["cores"] >= 1
    assert capsys.readouterr().out.startswith("device: {")
    assert first_gpu.main([*arguments, "--here", "device"]) == 0
    assert json.loads(capsys.readouterr().out)["torch"] == row["torch"]
