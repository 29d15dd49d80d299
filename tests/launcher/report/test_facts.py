"""What counts of a run's metrics: steps and evaluations that a restart took back do not; torn lines are passed over."""

from __future__ import annotations

import pytest

from efflaunch.errors import ConfigError
from efflaunch.launcher.report.facts import newest_metrics, read_facts
from efflaunch.tests.launcher.report.evaluated_run import make_run


def test_facts(tmp_path):
    facts = read_facts(make_run(tmp_path))
    assert [(event["step"], event["loss"]) for event in facts.steps] == [(1, 7.0), (2, 6.0), (3, 4.5), (4, 3.5), (5, 2.5), (6, 1.5)]
    assert [(event["step"], event["loss"]) for event in facts.evaluations] == [(0, 9.0), (6, 2.25)]
    assert len(facts.of("start")) == 2 and len(facts.of("checkpoint")) == 1
    assert facts.changes == ((2, ("train.steps: 4 -> 6",)),)
    assert (facts.state, facts.revision, len(facts.attempts)) == ("done", 2, 2)
    assert facts.median("tokens_per_s") == 204.0 and facts.median("mfu") is None
    assert newest_metrics(facts)["eval/web/loss"] == 2.25


def test_an_earlier_revision_that_is_damaged_is_said_to_be(tmp_path):
    run_dir = make_run(tmp_path)
    (run_dir / "revisions" / "1.yaml").write_text("{")
    assert read_facts(run_dir).changes == ((2, ("the revision before it cannot be read",)),)


def test_no_run(tmp_path):
    with pytest.raises(ConfigError, match=r"no run\.yaml"):
        read_facts(tmp_path)


def test_a_run_that_has_not_started(tmp_path):
    run_dir = make_run(tmp_path)
    (run_dir / "metrics.jsonl").unlink()
    (run_dir / "state.json").unlink()
    facts = read_facts(run_dir)
    assert facts.steps == () and facts.state == "not started" and facts.progress.step == 0
