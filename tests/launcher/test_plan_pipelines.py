"""`efflaunch plan --pipelines`: its table and its JSON."""

from __future__ import annotations

import json

import pytest

from efflaunch.launcher import cli
from efflaunch.tests.launcher.test_pipeline_choice import SLOW_LINKS


def test_the_table_has_each_way_as_it_is_typed(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", *SLOW_LINKS, "--pipelines"]) == 0
    printed = capsys.readouterr().out
    rows = [line for line in printed.splitlines() if "parallel.pipeline.stages=" in line]
    assert len(rows) == 22 and "parallel.pipeline.stages=1 " in printed and " at least" in rows[-1]
    assert "at least" not in rows[0] and "order=interleaved" in rows[0]


def test_json_has_what_was_planned_and_what_was_not(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", *SLOW_LINKS, "--pipelines", "--json"]) == 0
    first, *others = json.loads(capsys.readouterr().out)["pipelines"]
    assert first["fits"] and first["stages"] > 1 and 0 < first["bubble"] < 1 and first["peak_bytes"] > 1 << 30
    assert first["least_s"] <= first["time_s"] and first["reason"] is None
    whole = next(one for one in others if one["stages"] == 1)
    assert whole["time_s"] > first["time_s"] and whole["bubble"] == 0 and whole["overrides"] == ["parallel.pipeline.stages=1"]
    assert others[-1]["time_s"] is None and "at least" in others[-1]["reason"]


def test_not_with_lengths(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", "+experiment=quickstart", "--pipelines", "--lengths", "github"]) == 93
    assert "--pipelines with --lengths" in capsys.readouterr().err
