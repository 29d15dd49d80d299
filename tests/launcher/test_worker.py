"""A rank's error is on record before anything of it is shut down; only an orderly end shuts anything down."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from efflaunch.launcher.agent import worker
from efflaunch.launcher.rundir.state import read_state
from efflaunch.tests.launcher.runs import environment
from efflaunch.tests.limits import ENDS_S
from efflaunch.tests.test_real_runs import BASE, make_corpus
from efflaunch.utils.helper_thread import HelperThread

SIDE = Path(worker.__file__).parents[2] / "tests" / "blocked_side.py"
# Of everything that could block there is one: a planner, an optimizer on the host, activations on the host.
WITH_ALL = (
    *BASE, "train.steps=2", "parallel.sequence=adaptive", "parallel.probe_s=0", "optim.state_device=host", "memory=memo",
    "launcher.max_restarts=0", "launcher.hang_factor=null", "checkpoint.every_steps=null",
)  # fmt: skip


def run(directory: Path, **variables: str) -> tuple[int, str]:
    make_corpus(directory)
    done = subprocess.run(
        [sys.executable, str(SIDE), "train", *WITH_ALL],
        cwd=directory,
        env=environment() | variables,
        capture_output=True,
        text=True,
        timeout=ENDS_S,
    )
    return done.returncode, done.stdout + done.stderr


def shut(directory: Path) -> set[str]:
    return {path.name.removeprefix("shut-") for path in (directory / "runs" / "run").glob("shut-*")}


def test_an_error_is_on_record_though_every_shutdown_blocks(tmp_path: Path) -> None:
    code, text = run(tmp_path, FAIL_RANK="1")
    assert code == 1, text
    state = read_state(tmp_path / "runs" / "run")
    assert state is not None and state.attempts[0].failure is not None
    assert state.attempts[0].failure.rank == 1 and "the wheels came off" in state.attempts[0].failure.message
    record = json.loads((tmp_path / "runs" / "run" / "logs" / "attempt-1" / "rank-1.error.json").read_text())
    assert record["message"] == "the wheels came off" and "in raising" in record["traceback"]
    assert shut(tmp_path) == set()


@pytest.mark.slow
def test_an_orderly_end_shuts_everything_down(tmp_path: Path) -> None:
    code, text = run(tmp_path)
    assert code == 0, text
    every = {f"{name}-{rank}" for rank in (0, 1) for name in ("DefaultAllocator.close", "ArenaStore.close", "HostUpdater.close")}
    groups = {f"torch.distributed.destroy_process_group-{rank}" for rank in (0, 1)}
    assert shut(tmp_path) == every | groups | {"PlanService.close-0"}


def test_threads_with_last_words_are_waited_for_and_others_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    said, gate, codes = [], threading.Event(), []
    monkeypatch.setattr(worker.os, "_exit", lambda code: codes.append((code, list(said))))
    never = HelperThread(threading.Event().wait, "never")
    last = HelperThread(lambda: (gate.wait(), said.append("last words")), "sink")  # type: ignore[arg-type,func-returns-value]
    last.is_ending = True
    never.start()
    last.start()
    threading.Timer(0.1, gate.set).start()
    worker._end(93)
    assert codes == [(93, ["last words"])]


def test_what_is_imported_before_ranks_are_forked_is_not_collected_in_them() -> None:
    preloads = "import gc; from efflaunch.launcher.agent.worker import TRAIN, preload; preload(TRAIN)"
    code = f"{preloads}; print(gc.isenabled(), gc.get_freeze_count())"
    enabled, frozen = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert enabled == "True" and int(frozen) > 1000
