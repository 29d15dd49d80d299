"""One run, gone on with from other directories: its learning rate, its paths, a corpus that was replaced, and what is exported."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from efflaunch.launcher.rundir.metrics_reader import MetricsFollower
from efflaunch.launcher.rundir.run_dir import read_run
from efflaunch.tests.test_real_runs import BASE, make_corpus, run
from efflaunch.tests.training.test_export_files import CORPUS, make_tokenizer
from efflaunch.training.optimizers.lr_schedule import learning_rate

ONE = (*BASE, "cluster.ranks_per_node=1", "parallel.tokens_per_rank=256", "data.global_batch_tokens=256", "checkpoint.every_steps=2")


def rates(run_dir: Path) -> dict[int, float]:
    return {event["step"]: event["lr"] for event in MetricsFollower(run_dir).read() if event["event"] == "step"}


@pytest.mark.slow
def test_a_run_is_resumed_from_anywhere_and_nothing_changes_in_silence(tmp_path: Path) -> None:
    place, elsewhere = tmp_path / "place", tmp_path / "elsewhere"
    place.mkdir()
    elsewhere.mkdir()
    make_corpus(place)
    tokenizer = make_tokenizer(place / "tok", eos_token="<eos>")
    described = CORPUS | {"tokenizer": {"path": str(tokenizer), "eos_token": "<eos>"}, "loss_mask": False}
    (place / "corpus.json").write_text(json.dumps(described))
    run(place, "train", *ONE, "optim.schedule=linear", "train.steps=4")
    run_dir = place / "runs" / "run"
    config = read_run(run_dir).config
    assert config.data.prefixes == [str(place / "corpus")]
    first = {step + 1: learning_rate(config.optim, step, 4) for step in range(4)}
    assert rates(run_dir) == pytest.approx(first)
    text = run(elsewhere, "resume", "../place/runs/run", "train.steps=6", expect=93)
    assert "optim.schedule_on_resume: found keep, and a linear schedule over 4 steps that ends at 0" in text
    assert len(list((run_dir / "logs").glob("attempt-*"))) == 1 and read_run(run_dir).revision == 1, "nothing was written"
    text = run(elsewhere, "resume", "../place/runs/run", "train.steps=6", "optim.schedule_on_resume=rewarm", "optim.warmup_steps=1")
    assert "learning rate: linear schedule begun anew, 1 step of warm-up and the decay to step 6: 0.001 at step 5" in text
    assert rates(run_dir) == pytest.approx(first | {5: 1e-3, 6: 1e-3})

    tokens = np.memmap(place / "corpus.bin", dtype="<u2", mode="r+")
    tokens[:] = tokens[::-1].copy()
    tokens.flush()
    more = ("train.steps=8", "optim.schedule_on_resume=stretch")
    text = run(elsewhere, "resume", str(run_dir), *more, expect=93)
    assert f"found something else now: corpus {place / 'corpus'}: other tokens; expected what the run was trained on so far" in text
    text = run(elsewhere, "resume", str(run_dir), *more, "data.changed=accept")
    assert f"other documents follow: corpus {place / 'corpus'}: other tokens" in text and "stretched from 6 to 8 steps" in text
    assert run(elsewhere, "resume", str(run_dir)).count("other documents") == 0, "the last checkpoint knows the new ones"

    text = run(elsewhere, "export", "../place/runs/run", "out")
    assert f"tokenizer: {tokenizer}" in text and "chat template: the one the corpus was made with; generation stops at <|end|>" in text
    assert (elsewhere / "out" / "tokenizer.json").read_bytes() == (tokenizer / "tokenizer.json").read_bytes()
