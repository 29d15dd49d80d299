"""Runs whose ranks hang, with a fake training function: stacks, names, restarts. Watches take time to pass only while they are at rest."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

from efflaunch.launcher.agent import hang_store as hang_others
from efflaunch.launcher.agent import procfs
from efflaunch.launcher.agent.hang_store import StoreOthers
from efflaunch.launcher.agent.hang_verdict import Frame
from efflaunch.launcher.agent.procfs import NOT_INSTALLED, find_spy, kernel_view, native_stacks, process_state, spied_frames
from efflaunch.launcher.rundir.metrics_reader import MetricsFollower
from efflaunch.launcher.rundir.progress import RunProgress
from efflaunch.tests.launcher.runs import Run, environment, train
from efflaunch.tests.limits import ENDS_S, wait_until

SOON = ("launcher.hang_factor=1", "launcher.hang_min_s=5", "launcher.hang_startup_s=1h")


def losses(run: Run) -> dict[int, float]:
    return RunProgress().apply(MetricsFollower(run.run_dir).read()).losses


def stacks(run: Run, rank: int) -> str:
    return (run.run_dir / "logs" / "attempt-1" / f"stacks-{rank}.txt").read_text()


def efflaunch(directory: Path, *words: str) -> str:
    """What a command printed."""
    command = [sys.executable, "-m", "efflaunch", *words]
    done = subprocess.run(command, cwd=directory, env=environment(), capture_output=True, text=True, timeout=ENDS_S)
    assert done.returncode == 0, done.stderr
    return done.stdout


def recovered(run: Run) -> Any:
    """The failure of the attempt that hung; the one after it went to the end."""
    assert run.process.wait(ENDS_S) == 0, run.text()
    first, second = run.state().attempts
    assert first.failure is not None and first.restarted and second.exit_code == 0
    assert losses(run) == {step: 10.0 / step for step in range(1, 13)}
    return first.failure


def test_a_stopped_rank_is_named_and_the_run_resumes(tmp_path: Path) -> None:
    run = train(tmp_path, *SOON, mishaps="stop:1:7", FAKE_CLOCK="rest")
    failure = recovered(run)
    assert failure.rank == 1 and failure.log == "logs/attempt-1/stacks-1.txt"
    assert "no progress for" in failure.message and "is stopped and cannot run" in failure.message
    assert failure.message.endswith("stacks of all ranks: logs/attempt-1/stacks-*.txt")
    assert "the process is stopped, so it cannot write them" in stacks(run, 1) and "T (stopped)" in stacks(run, 1)
    assert "in one_step" in stacks(run, 0) and "all_reduce" in stacks(run, 0)
    if find_spy():
        assert "go_wrong" in failure.traceback and "launcher/agent/agent.py" not in failure.traceback


def test_a_blocked_rank_is_distinguished_from_those_that_wait_for_it(tmp_path: Path) -> None:
    run = train(tmp_path, *SOON, "cluster.ranks_per_node=3", mishaps="block:0:7", FAKE_CLOCK="rest")
    failure = recovered(run)
    assert failure.rank == 0 and "rank 0 on" in failure.message and "in _block" in failure.message
    assert "the others wait at tests/launcher/fake_training.py" in failure.message
    assert failure.traceback.startswith("Where rank 0 was (most recent call last):") and "in _block" in failure.traceback.splitlines()[-1]
    for rank in range(3):
        assert "Python stacks (faulthandler)" in stacks(run, rank) and "wchan" in stacks(run, rank)


def test_a_rank_deaf_to_every_signal_is_ended_all_the_same(tmp_path: Path) -> None:
    run = train(tmp_path, *SOON, mishaps="hang:1:7", FAKE_CLOCK="rest")
    assert recovered(run).rank == 1


def test_budgets_hold_for_hangs_too(tmp_path: Path) -> None:
    run = train(tmp_path, *SOON, "launcher.max_restarts=1", mishaps="block:1:7!", FAKE_CLOCK="rest")
    assert run.process.wait(ENDS_S) == 1, run.text()
    assert "failed 2 times without getting past step 6" in run.text() and len(run.state().attempts) == 2
    shown = efflaunch(tmp_path, "logs", "runs/run")
    assert "attempt-2/stacks-1.txt, in full" in shown and "attempt-2/rank-1.log" in shown and "in _block" in shown


def test_status_says_who_is_silent_long_before(tmp_path: Path) -> None:
    run = train(tmp_path, "launcher.hang_factor=null", "launcher.hang_min_s=4", mishaps="block:1:7", FAKE_CLOCK="rest")
    run.wait_for_step(6)
    wait_until(lambda: any((run.run_dir / "logs" / "attempt-1").glob("pulse-*.json")))
    status = efflaunch(tmp_path, "status", "runs/run", "--json")
    silent = json.loads(status)["silent"]
    assert [row["rank"] for row in silent] == [0, 1] and silent[1]["doing"] == "planning, after step 6" and silent[1]["silent_s"] > 1
    text = efflaunch(tmp_path, "status", "runs/run")
    assert "silent      rank " in text and "planning, after step 6" in text
    assert run.process.poll() is None, "launcher.hang_factor=null ends nothing"
    wait_until(lambda: "ranks are silent:\n  rank " in run.text())
    run.send(signal.SIGINT)
    wait_until(lambda: run.state().state == "stopping")
    time.sleep(0.6)
    run.send(signal.SIGINT)
    run.wait()


def test_a_run_that_continues_is_not_called_stuck(tmp_path: Path) -> None:
    run = train(tmp_path, *SOON, mishaps="", FAKE_CLOCK="rest")
    assert run.wait() == 0
    status = efflaunch(tmp_path, "status", "runs/run", "--json")
    facts = json.loads(status)
    assert facts["silent"] == [] and facts["stragglers"] == [] and facts["attempts"] == 1


def test_agents_find_out_together() -> None:
    from torch.distributed import TCPStore

    head = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=ENDS_S))
    stores = [head, *(TCPStore("127.0.0.1", head.port, is_master=False, timeout=timedelta(seconds=ENDS_S)) for _ in range(2))]
    now = 0.0
    agents = [StoreOthers(store, node, 3, clock=lambda: now) for node, store in enumerate(stores)]
    assert not agents[0].asked()
    agents[2].ask()
    assert not agents[0].asked(), "it looks once a second"
    now += hang_others._POLL_S
    assert agents[0].asked() and agents[1].asked()
    results: dict[int, Any] = {}
    threads = [Thread(target=lambda node=node: results.update({node: agents[node].exchange([{"rank": node}])})) for node in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(ENDS_S)
    for node in range(3):
        rows, missing = results[node]
        assert sorted(row["rank"] for row in rows) == [0, 1, 2] and missing == []


def test_an_agent_that_is_gone_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.distributed import TCPStore

    monkeypatch.setattr(hang_others, "_ANSWER_S", 1.0)
    head = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=ENDS_S))
    rows, missing = StoreOthers(head, 0, 2).exchange([{"rank": 0}])
    assert rows == [{"rank": 0}] and missing == [1]


SPIED = """\
Process 42: python -m x
Python v3.11.7 (/usr/bin/python3.11)

Thread 42 (idle): "MainThread"
    futex_wait (libc.so.6)
    all_reduce (torch/_C.so)
    one_step (/home/me/efflaunch/training/step.py:62)
    <module> (/home/me/main.py:3)
Thread 43 (idle): "Thread-1"
    other (/home/me/other.py:1)
"""


def test_frames_of_py_spy() -> None:
    assert spied_frames(SPIED) == (Frame("/home/me/efflaunch/training/step.py", 62, "one_step"), Frame("/home/me/main.py", 3, "<module>"))
    assert spied_frames("Error: no such process") == ()


def test_without_py_spy_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(procfs, "find_spy", lambda: None)
    stacks = native_stacks({3: os.getpid()})
    assert stacks.texts == {3: NOT_INSTALLED} and stacks.frames == {} and "efflaunch[watch]" in NOT_INSTALLED


def test_a_process_that_is_gone() -> None:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    assert process_state(process.pid) == "" and "the process is gone" in kernel_view(process.pid)


def test_what_was_found_of_a_hang_stands_until_its_ranks_are_gone() -> None:
    """Ranks that were killed for it and are not reaped yet have no stacks: looked at again they would be a hang without a culprit."""
    from types import SimpleNamespace

    from efflaunch.launcher.agent.agent import Agent

    verdicts, kills = ["rank 1 is stopped", "nobody is at fault"], []
    agent: Any = SimpleNamespace(
        stopping=False,
        hang=None,
        _note_stop=lambda: None,
        peers=SimpleNamespace(look=lambda ranks, kill: None),
        ranks=SimpleNamespace(processes={0: SimpleNamespace(pid=1, exitcode=None)}, kill=lambda: kills.append(1)),
        watch=SimpleNamespace(look=lambda pids: verdicts.pop(0)),
    )
    for _ in range(3):
        Agent._poll(agent)
    assert agent.hang == "rank 1 is stopped" and kills == [1]
