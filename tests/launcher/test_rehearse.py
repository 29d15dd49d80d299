"""`efflaunch rehearse`: what it prints, what it refuses before anything starts, and whole rehearsals."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from efflaunch.launcher.cli import main
from efflaunch.launcher.commands import rehearse
from efflaunch.launcher.config.compose import compose
from efflaunch.tests.launcher.runs import environment
from efflaunch.tests.limits import ENDS_S
from efflaunch.training.config import Objective


def test_dry_run_prints_a_command_that_composes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["rehearse", "+experiment=llama8b_128k_sft", "--ranks", "2", "--tokens", "512", "--dry-run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "rehearsing llama8b_128k_sft, as at full size:" and "not rehearsed:" in lines
    command = shlex.split(lines[-1])
    assert command[:2] == ["efflaunch", "train"] and list(tmp_path.iterdir()) == []
    config = compose(command[2:], None)
    assert (config.cluster.ranks_per_node, config.data.max_seq_len, config.train.steps) == (2, 512, 2)


def test_what_does_not_fit_is_refused_as_training_would(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["rehearse", "+experiment=llama8b_1M", "cluster.device_memory_bytes=8GiB"]) == 93
    assert "Try: " in capsys.readouterr().err and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("objective", [Objective.DPO, Objective.GRPO])
def test_a_corpus_of_its_own(tmp_path: Path, objective: Objective) -> None:
    words = rehearse._make_corpus(objective, tmp_path / "data")
    assert words[0] == f"data.prefixes=[{tmp_path / 'data' / 'corpus'}]" and words[1] == f"data.tokenizer={tmp_path / 'data' / 'tokenizer'}"
    kinds = json.loads((tmp_path / "data" / "records.jsonl").read_text().splitlines()[0])
    assert set(kinds) == ({"prompt", "chosen", "rejected"} if objective is Objective.DPO else {"prompt", "completions"})


@pytest.mark.slow
@pytest.mark.parametrize(
    "words",
    [
        ["+experiment=qwen3_30b_a3b_1M", "parallel.experts.ep=2"],
        ["+experiment=llama70b_512k", "parallel.pipeline.stages=2"],
        ["+experiment=llama8b_lora_1M_1gpu"],
        ["+experiment=llama8b_128k_sft", "train.objective=dpo", "optim.state_device=host"],
        ["+experiment=qwen3_8b_1M", "train.objective=grpo", "parallel.sequence=adaptive"],
    ],
    ids=lambda words: words[0],
)
def test_a_rehearsal_trains_saves_and_resumes(tmp_path: Path, words: list[str]) -> None:
    command = [sys.executable, "-m", "efflaunch", "rehearse", *words, "--ranks", "2", "--tokens", "512"]
    done = subprocess.run(command, cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=ENDS_S)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    assert done.stdout.splitlines()[-1].startswith("rehearsed: ") and "step 4/4  loss" in done.stdout
