"""A rank that runs out of memory ends the run at once, says where and why, and what it suggests works."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from efflaunch.errors import EXIT_DONE, EXIT_USER
from efflaunch.launcher.rundir.state import read_state
from efflaunch.tests.launcher.runs import environment
from efflaunch.tests.limits import ENDS_S

SIDE = Path(__file__).with_name("oom_side.py")
BASE = (
    "+experiment=quickstart", "memory=keep", "cluster.ranks_per_node=2", "parallel.sequence=static", "model.num_layers=6",
    "model.hidden_size=64", "model.intermediate_size=128", "model.num_heads=4", "model.num_kv_heads=2", "data.max_seq_len=16K",
    "data.global_batch_tokens=16K", "parallel.tokens_per_rank=8K", "train.steps=3", "optim.warmup_steps=1", "checkpoint.every_steps=1",
    "run.id=run", "logging.display=plain",
)  # fmt: skip


def efflaunch(directory: Path, script: list[str], *words: str, **limit: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *script, *words], cwd=directory, env=environment() | limit, capture_output=True, text=True, timeout=ENDS_S
    )


@pytest.mark.parametrize(("kind", "size"), [("tensors", 128 << 20), pytest.param("process", 64 << 20, marks=pytest.mark.slow)])
def test_the_rank_the_place_and_a_cure_that_works(tmp_path, kind, size):
    # Freed tensors go back to the kernel at once, so that a process that may not grow cannot live on what it has kept.
    limit = {"OOM_RANK": "1", "OOM_KIND": kind, "OOM_BYTES": str(size), "MALLOC_MMAP_THRESHOLD_": "131072"}
    done = efflaunch(tmp_path, [str(SIDE)], "train", *BASE, **limit)
    assert done.returncode == EXIT_USER, done.stdout + done.stderr
    text = done.stderr
    assert re.search(r"out of memory on rank 1, step [23], (forward|backward|loss|optimizer|embedding)", text), text
    for part in ("more were asked for", "in tensors on a rank of 3.0 GiB", "by the ledger:", "certified: at most", "by the estimate"):
        assert part in text, text
    state = read_state(tmp_path / "runs" / "run")
    assert state is not None and len(state.attempts) == 1 and state.exit_code == EXIT_USER
    assert state.failure is not None and state.failure.rank == 1
    (command,) = re.findall(r"Try: efflaunch (resume .*)", text)
    assert "memory=auto" in command
    if kind == "process":
        return
    resumed = efflaunch(tmp_path, ["-m", "efflaunch"], *shlex.split(command))
    assert resumed.returncode == EXIT_DONE, resumed.stdout + resumed.stderr
    assert "the memory certificate" in resumed.stdout and "every activation is kept" not in resumed.stdout


def test_a_host_that_runs_low_saves_and_says_so(tmp_path):
    done = efflaunch(tmp_path, [str(SIDE)], "train", *BASE, OOM_RANK="0", OOM_KIND="host", OOM_BYTES=str(1 << 60))
    assert done.returncode == EXIT_USER, done.stdout + done.stderr
    assert re.search(r"host memory, on \S+, the node of rank 0, after step 1", done.stderr), done.stderr
    assert "before the kernel kills a rank" in done.stderr
    assert (tmp_path / "runs" / "run" / "checkpoints" / "step-00000001").is_dir()
