"""A run in stages as a person has it: a resume in either stage, on another layout, gives the same curve; what is refused before a start."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from efflaunch.launcher.rundir.metrics_reader import MetricsFollower
from efflaunch.tests.test_mix_runs import OPTIONS
from efflaunch.tests.test_real_runs import run
from efflaunch.training.data.writer import IndexedWriter

SOURCES = "data.sources={web: {prefixes: [web]}, code: {prefixes: [code]}}"
SHORT = "steps: 3, max_seq_len: 64, global_batch_tokens: 256"
STAGES = f"train.stages=[{{{SHORT}}}, {{weights: {{code: 3}}}}]"
TWO = ("cluster.ranks_per_node=2", "parallel.tokens_per_rank=256")
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory, generator = tmp_path_factory.mktemp("stages"), np.random.default_rng(3)
    for name in ("web", "code"):
        writer = IndexedWriter(str(directory / name), "uint16")
        for length in (2 + generator.integers(0, 200, 60)).tolist():
            writer.add(np.cumsum(generator.integers(0, 3, length)) % 97)
        writer.finish()
    return directory


def staged(*overrides: str) -> list[str]:
    own = [word for word in OPTIONS if not word.startswith("run.id")]
    return ["train", *own, "cluster.ranks_per_node=1", "parallel.tokens_per_rank=256", SOURCES, *overrides]


def curve(directory: Path, name: str) -> list[tuple[int, int, int, float]]:
    """(step, stage, tokens, loss) of each step."""
    events = [event for event in MetricsFollower(directory / "runs" / name).read() if event["event"] == "step"]
    return [(event["step"], event["train_stage"], event["tokens"], event["loss"]) for event in events]


def test_a_resume_in_either_stage_gives_the_same_curve(place: Path) -> None:
    run(place, *staged(STAGES, "train.steps=6", "run.id=whole", *TWO))
    run(place, *staged("train.stages=[{max_seq_len: 64, global_batch_tokens: 256}]", "train.steps=2", "run.id=parts"))
    run(place, "resume", "runs/parts", STAGES, "train.steps=5", *TWO)
    run(place, "resume", "runs/parts", "train.steps=6")
    whole, parts = curve(place, "whole"), curve(place, "parts")
    assert [row[:3] for row in parts] == [row[:3] for row in whole] and [row[1] for row in whole] == [1, 1, 1, 2, 2, 2]
    assert [row[3] for row in parts] == pytest.approx([row[3] for row in whole], rel=1e-5)
    assert max(row[2] for row in whole[:3]) < min(row[2] for row in whole[3:])


def test_a_stage_for_other_groups_of_ranks_is_refused(place: Path) -> None:
    asked = (STAGES, "train.steps=6", "run.id=other", "cluster.ranks_per_node=2", "parallel.tokens_per_rank=128")
    shown = run(place, *staged(*asked), expect=93)
    assert "train.stages[0].max_seq_len: found 64, for groups of 1 ranks" in shown and not (place / "runs" / "other").exists()
    planned = run(place, "plan", *staged(*asked, "parallel.sp_degree=2")[1:])
    assert "train.stages[0]: 3 steps of 256 tokens, sequences up to 64" in planned
