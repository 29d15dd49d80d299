"""docs/objectives.md as it stands, and what is true of its runs."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from efflaunch.tests.limits import ENDS_S
from efflaunch.tests.pages import run_page
from efflaunch.training.data.indexed import IndexedCorpus


def events(run: Path, kind: str) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [event for event in lines if event["event"] == kind]


def test_objectives_page(tmp_path: Path) -> None:
    printed = run_page("objectives.md", tmp_path)
    runs, corpora = tmp_path / "work" / "runs", tmp_path / "work" / "corpus"
    assert "train.objective=dpo" in printed and "train.objective=grpo" in printed
    pairs, rollouts = (IndexedCorpus(str(corpora / name)) for name in ("pairs", "rollouts"))

    steps = events(runs / "dpo", "step")
    assert steps[0]["loss"] == pytest.approx(math.log(2), abs=1e-5) and abs(steps[0]["dpo_margin"]) < 1e-4
    assert [step["step"] for step in steps] == list(range(1, 9)) and len(events(runs / "dpo", "start")) == 2
    assert steps[-1]["loss"] < steps[0]["loss"] and steps[-1]["dpo_margin"] > 0.05 and steps[-1]["dpo_accuracy"] > 0.9
    for step in steps:
        assert step["dpo_margin"] == pytest.approx(step["dpo_chosen_reward"] - step["dpo_rejected_reward"])
    assert [event["done_tokens"] for event in events(runs / "dpo", "score")] == [pairs.num_tokens], "once, not again on resume"
    scores = np.fromfile(runs / "dpo" / "scores" / "0-pairs.ref.bin")
    assert len(scores) == 2 * pairs.num_documents and (scores < 0).all()

    steps = events(runs / "grpo", "step")
    assert steps[0]["grpo_ratio"] == pytest.approx(1, abs=1e-4) and abs(steps[0]["grpo_kl"]) < 1e-6 and steps[0]["grpo_clip_fraction"] == 0
    assert steps[-1]["grpo_kl"] > 0
    scores = np.fromfile(runs / "grpo" / "scores" / "0-rollouts.ref.bin", dtype=np.float32)
    assert len(scores) == rollouts.num_tokens
    for document in range(rollouts.num_documents):
        span = rollouts.span(document, 0, int(rollouts.lengths[document]))
        mask = rollouts.mask(document, 0, int(rollouts.lengths[document]))
        assert ((scores[span] < 0) == mask).all(), "answers' tokens have one, prompts none"

    # Before anything is learnt a pair costs log 2, smoothed or not; the weight is on the chosen answers' mean per token.
    scores = np.fromfile(corpora / "pairs.ref.bin").reshape(-1, 2)[:, 0]
    lengths = [pairs.mask(document, 0, pairs.parts(document)[0]).sum() for document in range(pairs.num_documents)]
    lowest, highest = np.quantile(-scores / lengths, [0, 1])
    loss = events(runs / "again", "step")[0]["loss"]
    # On own samples every ratio is one, whatever it is of.
    assert events(runs / "gspo", "step")[0]["grpo_ratio"] == pytest.approx(1, abs=1e-4)
    assert events(runs / "again", "score") == [] and 0 < lowest * 0.2 <= loss - math.log(2) <= highest * 0.2

    # The weights have moved on: what the first ones said cannot be had again.
    shutil.rmtree(runs / "dpo" / "scores")
    (corpora / "pairs.ref.bin").unlink()
    command = [sys.executable, "-m", "efflaunch", "resume", "runs/dpo", "train.steps=9"]
    done = subprocess.run(command, cwd=tmp_path / "work", capture_output=True, text=True, timeout=ENDS_S)
    assert done.returncode == 93 and "found no log-probabilities under the weights this run began with" in done.stdout + done.stderr
