"""Pictures of a run as SVG that may stand in one page together."""

from __future__ import annotations

import builtins
import re
import sys
import xml.etree.ElementTree as ElementTree
from dataclasses import replace

import pytest

from efflaunch.errors import ConfigError
from efflaunch.launcher.report.facts import read_facts
from efflaunch.launcher.report.figures import PICTURES, pictures
from efflaunch.tests.launcher.report.evaluated_run import make_run


def test_every_picture_is_whole_and_by_itself(tmp_path):
    drawn = dict(pictures(read_facts(make_run(tmp_path, mfu=0.4, hidden=True))))
    assert list(drawn) == [title for title, _ in PICTURES]
    ids: set[str] = set()
    for svg in drawn.values():
        assert ElementTree.fromstring(svg).tag == "{http://www.w3.org/2000/svg}svg"
        own = re.findall(r'\bid="([^"]+)"', svg)
        assert own and not ids & set(own)
        ids |= set(own)
        assert set(re.findall(r'href="#([^"]+)"', svg)) | set(re.findall(r"url\(#([^)]+)\)", svg)) <= set(own)
    assert ">MFU<" in drawn["Use of the devices"] and ">HFU<" in drawn["Use of the devices"]
    assert ">best, pinned<" in drawn["Loss"] and ">web, step 6<" in drawn["Loss by position"]
    assert (
        ">2 ranks<" in drawn["Plans: groups over steps"] and ">not saved<" not in drawn["Time line"] and ">evaluated<" in drawn["Time line"]
    )
    heat = drawn["Needles by length and depth"]
    assert all(f">{text}<" in heat for text in ("100", "75", "50", "25", "50 %", "8K")) and "% of exact answers, step 6" in heat
    assert "certificate (resident, libraries in)" in drawn["Memory, predicted and measured"]


def test_what_needles_say_is_not_drawn_as_a_loss(tmp_path):
    """Their best share is no loss, and their texts of several lengths have no targets in common."""
    run_dir = make_run(tmp_path, hidden=True)
    metrics = run_dir / "metrics.jsonl"
    metrics.write_text(metrics.read_text().replace('"metric": "eval/web/loss"', '"metric": "eval/needles/exact"'))
    drawn = dict(pictures(read_facts(run_dir)))
    assert "best, pinned" not in drawn["Loss"] and ">needles<" in drawn["Loss"]
    facts = read_facts(run_dir)
    alone = replace(facts, evaluations=tuple(event for event in facts.evaluations if event.get("needles")))
    titles = [title for title, _ in pictures(alone)]
    assert "Needles by length and depth" in titles and "The same targets with more context" not in titles


def test_on_cpus_there_is_no_share_of_a_peak(tmp_path):
    drawn = dict(pictures(read_facts(make_run(tmp_path))))
    assert "no peak known" in drawn["Use of the devices"]


def test_the_same_run_has_the_same_pictures(tmp_path):
    facts = read_facts(make_run(tmp_path))
    assert list(pictures(facts)) == list(pictures(facts))


def test_a_run_without_metrics_has_none(tmp_path):
    run_dir = make_run(tmp_path)
    (run_dir / "metrics.jsonl").unlink()
    assert list(pictures(read_facts(run_dir))) == []


def test_without_matplotlib_it_says_what_to_install(tmp_path, monkeypatch):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name.partition(".")[0] == "matplotlib":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ConfigError, match="efflaunch\\[plot\\]"):
        list(pictures(read_facts(make_run(tmp_path))))
