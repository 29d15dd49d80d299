"""efflaunch as a person runs it: real processes, a fake training function."""

from __future__ import annotations

import os
import signal
import socket
import time
from pathlib import Path

import psutil
import pytest

from efflaunch.launcher.rundir.lock import is_locked
from efflaunch.launcher.rundir.metrics_reader import MetricsFollower, checkpoint_steps
from efflaunch.launcher.rundir.progress import RunProgress
from efflaunch.launcher.rundir.run_dir import read_run
from efflaunch.tests.launcher.runs import Run, descendants, is_alive, train
from efflaunch.tests.limits import wait_until


def losses(run: Run) -> dict[int, float]:
    return RunProgress().apply(MetricsFollower(run.run_dir).read()).losses


def test_a_run_to_the_end_and_on(tmp_path: Path) -> None:
    run = train(tmp_path)
    assert run.wait() == 0, run.text()
    assert run.state().state == "done" and run.state().exit_code == 0
    assert losses(run) == {step: 10.0 / step for step in range(1, 13)}
    text = run.output.read_text()
    assert "step 12/12  loss 0.8333" in text and "efflaunch resume runs/run train.steps=24" in text
    more = Run(tmp_path, "resume", "runs/run", "train.steps=15")
    assert more.wait() == 0, more.text()
    assert "train.steps: 12 -> 15" in more.text() and read_run(run.run_dir).revision == 2
    assert (run.run_dir / "revisions" / "1.yaml").is_file() and checkpoint_steps(run.run_dir)[-1] == 15
    assert [attempt.number for attempt in more.state().attempts] == [1, 2]
    assert (run.run_dir / "logs" / "attempt-2" / "rank-1.log").is_file()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR2, signal.SIGHUP])
def test_stop_signal_saves_and_exits_75(tmp_path: Path, number: signal.Signals) -> None:
    run = train(tmp_path, steps=100000)
    run.wait_for_step(2)
    run.send(number)
    assert run.wait() == 75, run.text()
    assert run.state().state == "preempted"
    stopped_at = checkpoint_steps(run.run_dir)[-1]
    assert stopped_at == max(losses(run)) and "stopped and saved" in run.text()
    resumed = train(tmp_path, steps=stopped_at + 3)
    assert resumed.wait() == 0, resumed.text()
    assert max(losses(run)) == stopped_at + 3 and resumed.state().revision == 2


def test_a_signal_to_every_process_at_once(tmp_path: Path) -> None:
    """A scheduler signals the whole step: launcher, agent and ranks get it, some of them twice."""
    run = train(tmp_path, steps=100000)
    run.wait_for_step(2)
    for pid in (*descendants(run.process.pid), run.process.pid, run.process.pid):
        os.kill(pid, signal.SIGUSR2)
    assert run.wait() == 75, run.text()


def test_stop_while_torch_is_being_imported(tmp_path: Path) -> None:
    """The import of the training function ends once the agent knows."""
    run = train(tmp_path, steps=100000, FAKE_IMPORT=str(tmp_path / "importing"))
    wait_until((tmp_path / "importing").exists)
    run.send(signal.SIGTERM)
    assert run.wait() == 75, run.text()
    assert not checkpoint_steps(run.run_dir) and not losses(run)


def test_second_ctrl_c_kills_a_rank_that_does_not_stop(tmp_path: Path) -> None:
    run = train(tmp_path, steps=100000, mishaps="hang:1:3")
    run.wait_for_step(2)
    run.send(signal.SIGINT)
    wait_until(lambda: run.state().state == "stopping")
    time.sleep(0.6)
    run.send(signal.SIGINT)
    assert run.wait() == 1, run.text()
    assert "were killed at once, as asked" in run.errors.read_text()
    assert run.state().state == "failed"


def test_grace_runs_out(tmp_path: Path) -> None:
    run = train(tmp_path, "launcher.grace_s=1", steps=100000, mishaps="hang:1:3")
    run.wait_for_step(2)
    run.send(signal.SIGTERM)
    assert run.wait() == 1, run.text()
    assert "did not save within launcher.grace_s=1 s" in run.errors.read_text()


@pytest.mark.parametrize("what", ["kill", "raise", "exit"])
def test_a_rank_lost_once_is_made_good(tmp_path: Path, what: str) -> None:
    run = train(tmp_path, mishaps=f"{what}:1:7")
    assert run.wait() == 0, run.text()
    first, second = run.state().attempts
    assert first.failure is not None and first.failure.rank == 1 and first.last_step == 6
    assert first.restarted and second.exit_code == 0
    starts = [event["step"] for event in MetricsFollower(run.run_dir).read() if event["event"] == "start"]
    assert starts == [1, 6], "went on from the checkpoint of step 5"
    assert losses(run) == {step: 10.0 / step for step in range(1, 13)}


def test_kill_9_from_outside(tmp_path: Path) -> None:
    run = train(tmp_path, mishaps="hold:1:7")
    run.wait_until_held(1, 7)
    os.kill(run.rank_pid(0), signal.SIGKILL)
    assert run.wait() == 0, run.text()
    assert "rank 0 was killed by signal 9 (SIGKILL)" in run.text()
    assert max(losses(run)) == 12


def test_budget_without_progress_and_the_traceback_last(tmp_path: Path) -> None:
    run = train(tmp_path, "launcher.max_restarts=1", mishaps="raise:1:7!")
    assert run.wait() == 1
    assert [attempt.last_step for attempt in run.state().attempts] == [6, 6]
    assert "failed 2 times without getting past step 6" in run.output.read_text()
    errors = run.errors.read_text().rstrip()
    assert "Traceback (most recent call last)" in errors and errors.endswith("RuntimeError: the wheels came off")


def test_progress_gives_the_budget_back(tmp_path: Path) -> None:
    run = train(tmp_path, "launcher.max_restarts=1", mishaps="kill:1:4,kill:0:7,raise:1:12")
    assert run.wait() == 0, run.text()
    assert len(run.state().attempts) == 4


def test_user_error_is_not_retried(tmp_path: Path) -> None:
    run = train(tmp_path, mishaps="user:1:6")
    assert run.wait() == 93
    assert len(run.state().attempts) == 1
    assert run.errors.read_text().strip() == "efflaunch: document 17: found nothing; expected tokens.\n  Try: another corpus"


@pytest.mark.parametrize("victim", ["launcher", "agent"])
def test_kill_9_leaves_no_orphans(tmp_path: Path, victim: str) -> None:
    run = train(tmp_path, steps=100000)
    run.wait_for_step(2)
    family = descendants(run.process.pid)
    agent = next(pid for pid in family if psutil.Process(pid).ppid() == run.process.pid)
    assert len(family) >= 3, "agent and two ranks"
    os.kill(run.process.pid if victim == "launcher" else agent, signal.SIGKILL)
    wait_until(lambda: not any(map(is_alive, family)))
    run.wait()
    # A process whose main thread is gone may hold its files for another moment.
    wait_until(lambda: not is_locked(run.run_dir))
    if victim == "agent":
        assert run.process.returncode == 1 and "the agent ended with -9" in run.text()
    resumed = train(tmp_path, steps=8)
    assert resumed.wait() == 0, resumed.text()


def test_a_run_directory_takes_one_at_a_time(tmp_path: Path) -> None:
    run = train(tmp_path, steps=100000)
    run.wait_for_step(1)
    second = train(tmp_path, steps=100000)
    assert second.wait() == 93
    errors = second.errors.read_text()
    assert f"found process {run.process.pid} on {socket.gethostname()}, there since " in errors and "efflaunch cancel runs/run" in errors
    run.send(signal.SIGTERM)
    assert run.wait() == 75


def test_ports_are_chosen_by_the_kernel_and_bound_to_loopback(tmp_path: Path) -> None:
    runs = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        runs.append(train(tmp_path / name, steps=100000))
    for run in runs:
        run.wait_for_step(1)
    for run in runs:
        processes = [psutil.Process(pid) for pid in descendants(run.process.pid)]
        listening = [port for process in processes for port in process.net_connections("tcp") if port.status == psutil.CONN_LISTEN]
        assert listening and {port.laddr.ip for port in listening} == {"127.0.0.1"}
        run.send(signal.SIGTERM)
    assert [run.wait() for run in runs] == [75, 75]
