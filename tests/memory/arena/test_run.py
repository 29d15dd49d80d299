"""A real run with memory.arena=planned: the same losses to the last bit, and metrics that say what the arena did."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from efflaunch.tests.launcher.runs import environment
from efflaunch.tests.limits import ENDS_S
from efflaunch.training.data.writer import IndexedWriter
from efflaunch.utils.compilers import compiler_path

BASE = (
    "model=tiny", "model.num_layers=2", "model.hidden_size=32", "model.intermediate_size=64", "model.num_heads=4", "model.num_kv_heads=2",
    "model.vocab_size=97", "data=indexed", "data.prefixes=[corpus]", "data.max_seq_len=256", "data.global_batch_tokens=1K",
    "cluster=local_cpu", "cluster.ranks_per_node=2", "parallel.tokens_per_rank=128", "parallel.scheme=ring", "train.dtype=float32",
    "parallel.sequence=static", "optim.schedule=constant", "optim.lr=1e-3", "logging.display=plain", "train.steps=40",
)  # fmt: skip


def events(directory: Path, name: str, *overrides: str) -> list[dict[str, Any]]:
    command = [sys.executable, "-m", "efflaunch", "train", *BASE, f"run.id={name}", *overrides]
    done = subprocess.run(command, cwd=directory, env=environment(), capture_output=True, text=True, timeout=ENDS_S)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return [json.loads(line) for line in (directory / "runs" / name / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.skipif(compiler_path() is None, reason="no C++ compiler")
def test_a_planned_run_is_the_default_run(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    writer = IndexedWriter(str(tmp_path / "corpus"), "uint16")
    for _ in range(64):
        writer.add(generator.integers(0, 97, 256))
    writer.finish()
    default, planned = events(tmp_path, "default"), events(tmp_path, "planned", "memory.arena=planned")
    losses = [[(event["loss"], event["grad_norm"]) for event in run if event["event"] == "step"] for run in (default, planned)]
    assert len(losses[0]) == 40 and losses[0] == losses[1]
    assert not any("arena" in event for event in default)
    steps = [event["arena"] for event in planned if event["event"] == "step"]
    assert [step["mode"] for step in steps[:2]] == ["default", "recorded"]
    assert {step["mode"] for step in steps[2:]} <= {"default", "recorded", "replayed"}
    news = {event["state"]: event for event in planned if event["event"] == "arena"}
    assert news["recorded"]["allocations"] > 200
    if replayed := [step for step in steps if step["mode"] == "replayed"]:
        last = replayed[-1]
        assert last["height_bytes"] >= last["max_live_bytes"] > 0
        assert last["served"] + last["out_of_order"] > 0.9 * (last["fallback"] + last["served"] + last["out_of_order"]), last
