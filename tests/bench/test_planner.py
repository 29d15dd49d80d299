"""The planner's benchmark end to end on a batch of a few sequences: every key, and figures that agree with each other."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from efflaunch.bench.planner import main

KEYS = {
    "gpus",
    "sequences",
    "distribution",
    "seed",
    "plan_s_p50",
    "plan_s_p99",
    "gap_inline",
    "gap_certificate",
    "speedup_vs_static",
    "speedup_vs_greedy",
    "speedup_vs_flexsp",
}


def test_every_row_says_what_was_asked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lengths = tmp_path / "lengths.txt"
    lengths.write_text("\n".join(str(n) for n in (100, 5000, 90_000, 12_000, 300)))
    words = ["--json", str(tmp_path / "r.json"), "--sizes", "64/8", "--distributions", "github", "--lengths", str(lengths)]
    limits = [
        "--seeds",
        "2",
        "--repeats",
        "2",
        "--certificate-s",
        "2",
        "--certificate-seeds",
        "1",
        "--flexsp-s",
        "1",
        "--flexsp-sizes",
        "64/8",
    ]
    assert main([*words, *limits]) == 0
    result = json.loads((tmp_path / "r.json").read_text())
    assert result["benchmark"] == "planner"
    assert [(row["distribution"], row["seed"]) for row in result["rows"]] == [
        ("github", 0),
        ("github", 1),
        (str(lengths), 0),
        (str(lengths), 1),
    ]
    for row in result["rows"]:
        assert row.keys() >= KEYS
        assert min(row["speedup_vs_static"], row["speedup_vs_greedy"]) >= 1 - 1e-12
        assert (row["speedup_vs_flexsp"] is None) == (row["seed"] != 0)
        assert (row["gap_certificate"] is None) == (row["seed"] != 0)
        if row["gap_certificate"] is not None:
            assert row["gap_certificate"] <= row["gap_certificate_of_inline_plan"] <= row["gap_inline"] + 1e-9
    assert "seed 1" in capsys.readouterr().out
