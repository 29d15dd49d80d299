"""`efflaunch compare`: a table and JSON."""

from __future__ import annotations

import json

from efflaunch.launcher.cli import main
from efflaunch.tests.launcher.report.evaluated_run import make_run


def test_compare(tmp_path, capsys):
    runs = [str(make_run(tmp_path, "one", mfu=0.4)), str(make_run(tmp_path, "two", "optim.lr=0.25"))]
    assert main(["compare", *runs, "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["settings"] == {"optim.lr": ["0.003", "0.25"]}
    first, second = facts["runs"]
    assert first["run"] == runs[0] and first["mfu"] == 0.4 and second["mfu"] is None
    assert (first["loss"], first["step"], first["steps"], first["peak_bytes"]) == (1.5, 6, 6, 4 << 28)
    assert first["evaluations"]["eval/web/loss"] == 2.25 and first["best"]["step"] == 6
    assert main(["compare", *runs]) == 0
    lines = capsys.readouterr().out.splitlines()
    (row,) = [line.split() for line in lines if line.startswith("optim.lr")]
    assert row == ["optim.lr", "0.003", "0.25"]
    assert any(line.split() == ["eval/web/context_gain", "0.1250", "0.1250"] for line in lines)
    assert not any("position" in line for line in lines)


def test_no_run_is_refused(tmp_path, capsys):
    assert main(["compare", str(make_run(tmp_path)), str(tmp_path)]) == 93
    assert "no run.yaml" in capsys.readouterr().err
