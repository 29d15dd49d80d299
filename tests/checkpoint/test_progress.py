"""A restore that takes long shows that it lives, and how far it is."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from efflaunch.checkpoint import progress
from efflaunch.checkpoint.files import step_path
from efflaunch.checkpoint.progress import RestoreProgress
from efflaunch.checkpoint.reader import Reader
from efflaunch.tests.checkpoint.test_engine import CONFIG, Run


def num_chunks(folder: Path) -> int:
    return sum(len(file.chunks) for file in Reader(folder).manifest(0).files if file.name.endswith(".distcp"))


def test_every_chunk_is_reported(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.train(0, 2)
    run.save(2, {})
    beats: list[int] = []
    resumed = Run(tmp_path, seed=99)
    assert resumed.engine.restore(lambda: beats.append(1)) is not None
    # What follows the last tensor in its file is not read.
    assert len(beats) in (num_chunks(step_path(tmp_path, 2)) - 1, num_chunks(step_path(tmp_path, 2))) and len(beats) > 10


def test_fetching_is_reported_too(tmp_path: Path) -> None:
    config = replace(CONFIG, mirror=str(tmp_path / "there"))
    run = Run(tmp_path / "here", config=config)
    run.train(0, 2)
    run.save(2, {})
    run.engine.close()
    shutil.rmtree(step_path(tmp_path / "here", 2))
    beats: list[int] = []
    resumed = Run(tmp_path / "here", seed=99, config=config)
    assert resumed.engine.restore(lambda: beats.append(1)) is not None
    assert len(beats) >= 2 * num_chunks(step_path(tmp_path / "here", 2)) > 0


def test_lines_for_people(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    mine, other = RestoreProgress(logs=True), RestoreProgress()
    for each in (mine, other):
        each.begin("reading step-00000002", 4 << 30)
    for seconds in (10, 35, 40, 70):
        now[0] = 100.0 + seconds
        mine.add(1 << 30)
        other.add(1 << 30)
    assert [record.getMessage() for record in caplog.records] == [
        "reading step-00000002: this rank has read 2.0 GiB of 4.0 GiB in 35 s",
        "reading step-00000002: this rank has read 4.0 GiB of 4.0 GiB in 1 min 10 s",
    ]
