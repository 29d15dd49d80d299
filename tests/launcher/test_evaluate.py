"""`efflaunch evaluate`: what it takes, what it refuses before anything starts, and its results as text."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from efflaunch.launcher.cli import main
from efflaunch.launcher.commands import evaluate
from efflaunch.launcher.config.run_config import Backend
from efflaunch.tests.data.corpora import write_corpus
from efflaunch.tests.launcher.report.evaluated_run import make_run


@pytest.fixture
def started(monkeypatch):
    """What the ranks would have been started with."""
    calls = []

    def run(config, run_dir, request):
        calls.append((config, request))
        Path(run_dir).mkdir()
        event = {"event": "eval", "time": 1.0, "step": 4, "corpus": "web", "loss": 2.0, "targets": 1000, "tokens": 9, "metrics": {}}
        rows = {"lengths": [{"length": 8192, "loss": 2.5, "targets": 7}], "positions": [{"up_to": 64, "loss": 3.0, "targets": 9}]}
        context = {"tokens": 4096, "targets": 7, "loss": 2.0, "short_loss": 2.25, "gain": 0.25}
        (Path(run_dir) / "metrics.jsonl").write_text(json.dumps({**event, **rows, "context": context}) + "\n")
        return 0

    monkeypatch.setattr(evaluate, "_run", run)
    return calls


def model_dir(folder):
    """A tiny Llama as save_pretrained writes it."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    config = LlamaConfig(
        vocab_size=97, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=4096,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


def test_a_model_directory(tmp_path, started, capsys):
    prefix = write_corpus(tmp_path / "held", [[1, 2, 3]])
    folder = model_dir(tmp_path / "my model")
    assert main(["evaluate", str(folder), f"eval.corpora={{web: {prefix}}}", "data.max_seq_len=1K", "train.seed=3"]) == 0
    config, request = started[0]
    assert request == {"checkpoint": None, "step": None} and config.model.path == str(folder)
    assert (config.train.dtype.value, config.cluster.name, config.data.max_seq_len, config.train.seed) == ("float32", "local_cpu", 1024, 3)
    assert config.launcher.backend is Backend.LOCAL and config.launcher.max_restarts == 0
    printed = capsys.readouterr().out
    assert "web: loss 2.0000 over 1,000 targets" in printed and "8K of context  2.5000" in printed
    assert "beyond 4K: 2.0000, with the last 4K alone 2.2500: the rest of the context is worth 0.2500" in printed
    assert main(["evaluate", str(folder), f"eval.corpora={{web: {prefix}}}", "cluster=h200_141g_8", "--json"]) == 93, "not this machine"


def test_json_is_all_there_is(tmp_path, started, capsys):
    prefix = write_corpus(tmp_path / "held", [[1, 2, 3]])
    assert main(["evaluate", str(model_dir(tmp_path / "model")), f"eval.corpora={{web: {prefix}}}", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["step"] is None and facts["corpora"][0]["corpus"] == "web" and "event" not in facts["corpora"][0]


def test_what_is_refused(tmp_path, started, capsys):
    prefix, folder = write_corpus(tmp_path / "held", [[1, 2, 3]]), str(model_dir(tmp_path / "model"))
    run_dir = str(make_run(tmp_path, "run", "train.keep_best=eval/web/loss", "eval.every_steps=2"))
    for words, told in (
        ((str(tmp_path), f"eval.corpora={{web: {prefix}}}"), "no run.yaml and no config.json"),
        ((folder,), "eval.corpora: found none"),
        ((folder, f"eval.corpora={{web: {prefix}}}", "--step", "3"), "no run.yaml"),
        ((folder, f"eval.corpora={{web: {prefix}}}", "eval.lengths=[8K]", "data.max_seq_len=8K"), "4K positions"),
        ((folder, f"eval.corpora={{web: {tmp_path / 'none'}}}"), "none.idx"),
        ((run_dir, f"eval.corpora={{other: {prefix}}}"), "checkpoints of steps: none"),
    ):
        assert main(["evaluate", *words]) == 93, words
        assert told in capsys.readouterr().err, words
    assert started == []
