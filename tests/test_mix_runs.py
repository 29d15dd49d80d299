"""A mix of sources as a person has it: losses and shares of each, a resume with other weights, and what is refused before a start."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from efflaunch.launcher.checks import open_run_data
from efflaunch.launcher.rundir.metrics_reader import MetricsFollower
from efflaunch.launcher.rundir.run_dir import read_run
from efflaunch.tests.test_real_runs import BASE, finish, run, start
from efflaunch.training.data.writer import IndexedWriter

SOURCES = "data.sources={{web: {{prefixes: [web], weight: {}}}, code: {{prefixes: [code], weight: {}, max_epochs: 4}}}}"
OPTIONS = [word for word in BASE if not word.startswith(("data.prefixes", "cluster.ranks", "parallel.tokens"))]
STEPS = 8
SHORT = ("train.steps=4", "run.id=x")
pytestmark = pytest.mark.slow


def mixed(*overrides: str) -> list[str]:
    return ["train", *OPTIONS, "cluster.ranks_per_node=1", "parallel.tokens_per_rank=256", SOURCES.format(3, 1), *overrides]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory, generator = tmp_path_factory.mktemp("mix"), np.random.default_rng(3)
    for name, least in (("web", 2), ("code", 60)):
        writer = IndexedWriter(str(directory / name), "uint16")
        for length in (least + generator.integers(0, 200, 60)).tolist():
            writer.add(np.cumsum(generator.integers(0, 3, length)) % 97)
        writer.finish()
    finish(start(directory, *mixed(f"train.steps={STEPS}")), directory)
    changes = ("data.sources.web.weight=0.25", "data.sources.code.weight=0.75", "cluster.ranks_per_node=2", "parallel.tokens_per_rank=128")
    run(directory, "resume", "runs/run", f"train.steps={2 * STEPS}", *changes)
    return directory


def events(directory: Path, kind: str) -> list[dict]:
    return [event for event in MetricsFollower(directory / "runs" / "run").read() if event["event"] == kind]


def by_name(event: dict) -> dict[str, dict]:
    return {row["name"]: row for row in event["sources"]}


def test_losses_of_sources_add_up_and_are_shown(place: Path) -> None:
    steps = events(place, "step")
    assert len(steps) == 2 * STEPS
    for event in steps:
        rows = [row for row in event["sources"] if row["targets"]]
        assert sum(row["targets"] for row in event["sources"]) == event["target_tokens"]
        total = sum(row["loss"] * row["targets"] for row in rows) / event["target_tokens"]
        assert total == pytest.approx(event["loss"], rel=1e-6)
    assert f"web {by_name(steps[0])['web']['loss']:.4f}" in (place / "output").read_text()
    last = by_name(steps[-1])["code"]
    text = f"code: loss {last['loss']:.4f}, {last['share']:.1%} of the tokens, {last['epochs']:.2f} epochs"
    assert text in run(place, "status", "runs/run")


def test_steps_are_those_of_the_course_whatever_the_ranks(place: Path) -> None:
    """One rank before the resume, two after it."""
    run_dir = place / "runs" / "run"
    source, line = open_run_data(read_run(run_dir).config, run_dir)
    assert line is None
    for step, event in enumerate(events(place, "step")):
        assert (len(source.lengths(step)), sum(source.lengths(step))) == (event["sequences"], event["tokens"])
        for use in source.usage(step + 1):
            row = by_name(event)[use.name]
            assert (row["tokens"], row["share"], row["epochs"]) == (use.tokens, use.share, use.epochs)


def test_weights_changed_on_resume_are_followed_and_recorded(place: Path) -> None:
    first, second = events(place, "start")
    assert first["mix_change"] is None and "code 25.0 % of the tokens, web 75.0 %" in first["data"]
    assert second["mix_change"] == f"data.sources from step {STEPS + 1} on: code 75.0 % of the tokens, web 25.0 %"
    assert any("weights" in line for line in second["data_changes"])
    before, after = (by_name(events(place, "step")[index]) for index in (STEPS - 1, -1))
    moved = {name: after[name]["tokens"] - before[name]["tokens"] for name in ("web", "code")}
    assert abs(before["web"]["share"] - 0.75) < 0.05 and abs(moved["code"] / sum(moved.values()) - 0.75) < 0.05
    # A step of before the change is explained as it was.
    explained = json.loads(run(place, "explain", "runs/run", "--step", "2", "--json"))
    assert explained["step"] == 2


def test_an_exhausted_source_is_refused_before_anything_is_written(place: Path) -> None:
    shown = run(place, *mixed("train.steps=1000", "run.id=long"), expect=93)
    assert "data.sources.code.max_epochs" in shown and "exhausted after step" in shown and not (place / "runs" / "long").exists()
    shown = run(place, "resume", "runs/run", "train.steps=1000", expect=93)
    assert "exhausted after step" in shown and len(events(place, "start")) == 2


def test_mistakes_are_named(place: Path) -> None:
    assert "data.sources.web.weight: found -1" in run(place, *mixed("data.sources.web.weight=-1", *SHORT), expect=93)
    assert "data.sources.web.wieght: found an unknown key" in run(place, *mixed("++data.sources.web.wieght=1", *SHORT), expect=93)
    weightless = ("data.sources.web.weight=0", "data.sources.code.weight=0", *SHORT)
    assert "weights that sum to more than 0" in run(place, *mixed(*weightless), expect=93)
    assert not (place / "runs" / "x").exists()
