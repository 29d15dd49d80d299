"""The fuzzer finds nothing on a short run, and finds what is put in front of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from efflaunch.bench import fuzz as fuzzer
from efflaunch.bench import report_fuzz
from efflaunch.bench.fuzz_inputs import BASE, DRY, Input
from efflaunch.launcher import cli
from efflaunch.launcher.config.compose import compose


def test_a_short_run_finds_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    tally = fuzzer.fuzz(60, 7)
    summary = tally.summary()
    assert not tally.kept, tally.kept
    assert summary["inputs"] >= 50 and len(summary["kinds"]) == 7
    assert (summary["tracebacks"], summary["hangs"], summary["accepted_wrong"]) == (0, 0, 0)
    assert "| corpus |" in "\n".join(report_fuzz.fuzz({**summary, "seed": 7, "seconds": 1.0}))


def test_what_it_looks_for_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = compose([*BASE, "run.id=run"])
    good = Input("command line", (*DRY, *BASE))
    assert fuzzer.try_input(good, base, tmp_path)[0] == "accepted"
    assert fuzzer.try_input(Input("command line", good.words, must_fail=True), base, tmp_path)[0] == "accepted_wrong"
    assert fuzzer.try_input(Input("command line", (*DRY, "x=1")), base, tmp_path)[0] == "refused"

    def fail(words: list[str]) -> int:
        raise KeyError("x")

    def spin(words: list[str]) -> int:
        while True:
            pass

    monkeypatch.setattr(cli, "_dispatch", fail)
    assert fuzzer.try_input(good, base, tmp_path)[0] == "tracebacks"
    monkeypatch.setattr(fuzzer, "CPU_S", 0.3)
    monkeypatch.setattr(cli, "_dispatch", spin)
    assert fuzzer.try_input(good, base, tmp_path)[0] == "hangs"
