"""What a resume is refused for before anything is started, and what it is told."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from efflaunch.errors import ConfigError, DataError
from efflaunch.estimate import stage_plans
from efflaunch.launcher import checks
from efflaunch.launcher.config.compose import compose
from efflaunch.launcher.config.run_config import Config
from efflaunch.tests.data.test_identity import make
from efflaunch.training.data.identity import data_identity, settings_of
from efflaunch.training.optimizers.lr_course import first_course


def config_of(tmp_path: Path, *overrides: str) -> Config:
    return compose(["+experiment=quickstart", "data.builtin=null", f"data.prefixes=[{tmp_path}/c]", *overrides])


@pytest.fixture
def saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[int, Any]:
    """A run with a checkpoint after step 20 of 20, and a newer one whose state cannot be read."""
    config, corpus = config_of(tmp_path), make(tmp_path / "c", [1, 2, 3, 4, 5], [2, 3])
    data = data_identity([corpus], settings_of(config.data, config.train.seed), "s")
    states = {20: {"extra": {"schedule": first_course(config.optim, 20).dump(config.optim, 20)}, "metadata": {"data": data}}}
    infos = [SimpleNamespace(step=step, path=step, is_whole=step != 19) for step in (19, 20, 21)]
    monkeypatch.setattr(checks, "list_checkpoints", lambda run_dir: infos)
    monkeypatch.setattr(checks, "read_state", states.__getitem__)
    return states


def test_a_resume_that_changes_nothing_prints_nothing(tmp_path: Path, saved: dict[int, Any]) -> None:
    assert checks.check_resumed(config_of(tmp_path), tmp_path) == []
    (line,) = checks.check_resumed(config_of(tmp_path, "train.steps=40"), tmp_path)
    assert "cosine schedule kept as it was, over 20 steps" in line
    lines = checks.check_resumed(config_of(tmp_path, "train.seed=1"), tmp_path)
    assert lines == ["data: train.seed: 0 -> 1"]


def test_a_schedule_that_has_ended_at_zero_is_asked_about(tmp_path: Path, saved: dict[int, Any]) -> None:
    with pytest.raises(ConfigError, match=r"(?s)optim.schedule_on_resume: .*=stretch .*=rewarm"):
        checks.check_resumed(config_of(tmp_path, "train.steps=40", "optim.min_lr_ratio=0"), tmp_path)


def test_another_optimizer_is_refused(tmp_path: Path, saved: dict[int, Any]) -> None:
    with pytest.raises(ConfigError, match=r"(?s)optim\.algorithm: found muon, and states of adamw in the checkpoint of step 20"):
        checks.check_resumed(config_of(tmp_path, "optim=muon"), tmp_path)


def test_a_replaced_corpus_is_asked_about(tmp_path: Path, saved: dict[int, Any]) -> None:
    make(tmp_path / "c", [1, 2, 3, 4, 6], [2, 3])
    with pytest.raises(DataError, match=r"step 20: found something else now: corpus .*/c: other tokens"):
        checks.check_resumed(config_of(tmp_path), tmp_path)
    assert checks.check_resumed(config_of(tmp_path, "data.changed=accept"), tmp_path) == [f"data: corpus {tmp_path}/c: other tokens"]


def test_a_source_that_is_exhausted_is_refused_at_a_first_start_too(tmp_path: Path) -> None:
    make(tmp_path / "c", [1, 2, 3, 4, 5], [2, 3])
    sources = f"data.sources={{web: {{prefixes: [{tmp_path}/c], max_epochs: 2}}}}"
    mixed = config_of(tmp_path, "data.prefixes=[]", sources, "data.max_seq_len=4", "data.global_batch_tokens=4", "train.steps=2")
    assert checks.check_resumed(mixed, tmp_path) == []
    with pytest.raises(DataError, match=r"data.sources.web.max_epochs: found 3.20 epochs of 5 tokens .*exhausted after step 2"):
        checks.check_resumed(replace(mixed, train=replace(mixed.train, steps=4)), tmp_path)


def test_what_evaluation_shares_with_a_source_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("c", "held"):
        make(tmp_path / name, [1, 2, 3, 4, 5], [2, 3])
    words = ("data.prefixes=[]", f"data.sources={{web: {{prefixes: [{tmp_path}/c]}}}}", f"eval.corpora={{mine: {tmp_path}/held}}")
    checks.report_evaluation(config_of(tmp_path, *words))
    assert "note: eval.corpora.mine shares 2 of 2 documents with training (document 0 is document 0 of" in capsys.readouterr().out


def test_a_run_without_checkpoints_has_nothing_to_compare(tmp_path: Path) -> None:
    assert checks.check_resumed(config_of(tmp_path), tmp_path) == []


def test_every_stage_is_planned_before_a_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[int]] = []
    monkeypatch.setattr(stage_plans, "check_stage_plans", lambda ledger, stages: seen.append([data.max_seq_len for data in stages]))
    sources = f"data.sources={{web: {{prefixes: [{tmp_path}/c]}}}}"
    checks.check_memory_plan(config_of(tmp_path, "data.prefixes=[]", sources, "train.stages=[{steps: 3, max_seq_len: 1K}, {}]"))
    assert seen == [[1024, 8192]]
