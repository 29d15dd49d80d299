"""Runs side by side."""

from __future__ import annotations

from efflaunch.launcher.report.comparison import compared, differences
from efflaunch.launcher.report.facts import read_facts
from efflaunch.tests.launcher.report.evaluated_run import make_run


def test_differences():
    assert differences([{"a": "1", "b": "2", "run.id": "x"}, {"a": "1", "b": "3", "run.id": "y", "c": "4"}]) == {
        "b": ["2", "3"],
        "c": [None, "4"],
    }


def test_runs_are_rows_of_facts(tmp_path):
    facts = compared([read_facts(make_run(tmp_path, "one", mfu=0.25))])
    (row,) = facts["runs"]
    assert (row["step"], row["loss"], row["mfu"], row["tokens_per_s"], row["attempts"]) == (6, 1.5, 0.25, 204.0, 2)
    assert facts["settings"] == {}
