"""docs/adapters.md as it stands, and what is true of its runs: small checkpoints, peft's logits, other worlds, another base, DPO."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from efflaunch.checkpoint.reader import Reader
from efflaunch.tests.limits import ENDS_S
from efflaunch.tests.pages import run_page


def events(run: Path, kind: str) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [event for event in lines if event["event"] == kind]


def efflaunch(work: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "efflaunch", *words], cwd=work, capture_output=True, text=True, timeout=ENDS_S)


def check_packed(work: Path, printed: str, weights: set[str]) -> None:
    """The page's run beside packed matrices: a checkpoint without them, peft's logits on what they say, the error of merging stated."""
    newest = max((work / "runs" / "qlora" / "checkpoints").iterdir())
    assert {key for key in Reader(newest).tensors if key.startswith("model.")} == weights
    assert "packed in NF4" in printed and "rounded to bfloat16: an error of" in printed
    assert efflaunch(work, "export", "runs/qlora", "qadapter").returncode == 0
    for out, form in (("qbase", "--base"), ("qmerged", "--merge")):
        assert efflaunch(work, "export", "runs/qlora", out, form, "--dtype", "float32").returncode == 0
    torch.testing.assert_close(logits(work, "qbase", "qadapter"), logits(work, "qmerged"), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(logits(work, "qbase"), logits(work, "base")), "the numbers of 4 bits"


@pytest.mark.slow
def test_adapters_page(tmp_path: Path) -> None:
    printed = run_page("adapters.md", tmp_path)
    work = tmp_path / "work"
    assert "56 factors" in printed and "of them trained" in printed and "certificate: at most" in printed
    lora = work / "runs" / "lora"
    start, steps = events(lora, "start")[0], events(lora, "step")
    assert [step["step"] for step in steps] == list(range(1, 15)) and steps[-1]["loss"] < steps[0]["loss"]
    assert start["trained_parameters"] < start["parameters"] / 2

    newest = max((lora / "checkpoints").iterdir())
    tensors = Reader(newest).tensors
    weights = {key for key in tensors if key.startswith("model.")}
    assert {key for key in weights if ".lora." not in key} == {"model.lm_head.weight"} and len(weights) == 57
    trained = start["trained_parameters"]
    size = sum(path.stat().st_size for path in newest.rglob("*") if path.is_file())
    assert 12 * trained <= size < 12 * trained + (1 << 20), "float32 weights and two moments of what is trained, and nothing else"

    # What was exported for peft is of step 12; the page's own merged model is of step 14.
    assert efflaunch(work, "export", "runs/lora", "merged12", "--merge", "--dtype", "float32", "--step", "12").returncode == 0
    torch.testing.assert_close(logits(work, "base", "adapter"), logits(work, "merged12"), rtol=1e-4, atol=1e-4)
    assert events(work / "runs" / "more", "step")[0]["loss"] < steps[1]["loss"], "it goes on where the adapter was"

    check_packed(work, printed, weights)

    # One rank more or less, and then other frozen weights.
    alone = ("cluster.ranks_per_node=1", "parallel.tokens_per_rank=2K")
    assert efflaunch(work, "resume", "runs/lora", "train.steps=15", *alone).returncode == 0
    assert events(lora, "start")[-1]["world_size"] == 1 and events(lora, "step")[-1]["step"] == 15
    for other, found in (
        ("adapter.alpha=16", "scaled by 4; now by 2"),
        ("adapter.method=qlora", "others were in NF4"),
        ("train.seed=1", "other weights than those of this seed"),
    ):
        refused = efflaunch(work, "resume", "runs/lora", "train.steps=16", "data.changed=accept", other)
        assert refused.returncode == 93 and found in refused.stdout + refused.stderr
    refused = efflaunch(work, "+experiment=quickstart_lora", "adapter.init=adapter", "adapter.rank=4", "run.id=refused")
    assert refused.returncode == 93 and "adapter.rank=8" in refused.stderr and not (work / "runs" / "refused").exists()


def logits(work: Path, model: str, adapter: str | None = None) -> torch.Tensor:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(work / model, dtype=torch.float32)
    if adapter is not None:
        loaded = PeftModel.from_pretrained(loaded, work / adapter)
    ids = torch.arange(64).unsqueeze(0)
    with torch.no_grad():
        values: torch.Tensor = loaded.eval()(input_ids=ids, position_ids=ids, use_cache=False).logits
    return values


def test_dpo_has_its_reference_without_a_pass_before_and_after_a_resume(tmp_path: Path) -> None:
    with (tmp_path / "pairs.jsonl").open("w") as file:
        for n in range(24):
            print(json.dumps({"prompt": f"Number {n}?", "chosen": f" It is {n}.", "rejected": f" I think it is {n + 1}."}), file=file)
    for words in (
        ("data", "tokenizer", "pairs.jsonl", "--vocab-size", "300", "--out", "tokenizer"),
        ("data", "prepare", "pairs.jsonl", "--tokenizer", "tokenizer", "--out", "corpus"),
    ):
        assert efflaunch(tmp_path, *words).returncode == 0
    done = efflaunch(
        tmp_path, "train", "model=tiny", "model.num_layers=2", "model.vocab_size=400", "data=indexed", "data.prefixes=[corpus]",
        "data.max_seq_len=128", "data.global_batch_tokens=256", "cluster=local_cpu", "cluster.ranks_per_node=2", "parallel.probe_s=0",
        "parallel.tokens_per_rank=64", "train.dtype=float32", "train.objective=dpo", "train.steps=3", "optim.schedule=constant",
        "optim.warmup_steps=0", "optim.lr=1e-2", "adapter=lora", "run.id=dpo",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert efflaunch(tmp_path, "resume", "runs/dpo", "train.steps=4").returncode == 0
    run = tmp_path / "runs" / "dpo"
    steps = events(run, "step")
    assert steps[0]["loss"] == pytest.approx(math.log(2), abs=1e-6) and [step["step"] for step in steps] == [1, 2, 3, 4]
    assert abs(steps[0]["dpo_margin"]) < 1e-6 and steps[-1]["dpo_margin"] != 0
    assert events(run, "score") == [] and not (run / "scores").exists()
