"""`efflaunch report`: where it writes, and what it refuses."""

from __future__ import annotations

import pytest

from efflaunch.errors import ConfigError
from efflaunch.launcher.cli import main
from efflaunch.launcher.commands.report import write_report
from efflaunch.launcher.report.facts import read_facts
from efflaunch.launcher.report.page import page
from efflaunch.tests.launcher.report.evaluated_run import make_run


def test_report_writes_the_page(tmp_path, capsys):
    run_dir = make_run(tmp_path)
    assert main(["report", str(run_dir), "--out", str(tmp_path / "r.html")]) == 0
    assert (tmp_path / "r.html").read_text() == page(read_facts(run_dir))
    assert "nothing else is needed" in capsys.readouterr().out
    assert main(["report", str(run_dir)]) == 0 and (run_dir / "report.html").is_file()


@pytest.mark.parametrize(("out", "words"), [("r.pdf", "ends in .html"), ("nowhere/r.html", "no directory")])
def test_what_is_no_page_is_refused(tmp_path, out, words):
    with pytest.raises(ConfigError, match=words):
        write_report(make_run(tmp_path), tmp_path / out)
    assert not (tmp_path / out).exists()


def test_no_run_is_refused(tmp_path, capsys):
    assert main(["report", str(tmp_path)]) == 93
    assert "no run.yaml" in capsys.readouterr().err and not (tmp_path / "report.html").exists()
