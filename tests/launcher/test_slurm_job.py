"""What the batch script asks on the first node, without a SLURM: attempts begun, gathered and settled from the files nodes leave."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from efflaunch.errors import ConfigError, EfflaunchError
from efflaunch.launcher.compose import compose
from efflaunch.launcher.env import SlurmPlace, slurm_place
from efflaunch.launcher.nodes.decide import Verdict
from efflaunch.launcher.rundir import attempt_dir, lock_run
from efflaunch.launcher.slurm import job
from efflaunch.launcher.slurm.files import cancel_file, stop_asked, stop_file
from efflaunch.launcher.state import RunState, end_attempt, read_state, write_state

PLACE = SlurmPlace(job=17, restart=0, node=0, num_nodes=2, name="n0", step_nodes=2, hosts="n[0-1]")
NEXT = replace(PLACE, restart=1)
Ranks = dict[int, int]


@pytest.fixture
def run_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(job, "head_address", lambda host, interface: "127.0.0.1")
    words = ["+experiment=quickstart", "launcher=slurm", "cluster.num_nodes=2", "cluster.ranks_per_node=2", "launcher.max_restarts=1"]
    assert job.queue(tmp_path / "run", compose(words)) == (1, [])
    return tmp_path / "run"


def state(run_dir: Path) -> RunState:
    known = read_state(run_dir)
    assert known is not None
    return known


def leave(run_dir: Path, node: int, ranks: Ranks, errors: dict[int, tuple[str, int]] | None = None) -> None:
    """What the agent of a node and its ranks leave: exit codes, and messages with the code they stand for."""
    logs = attempt_dir(run_dir, len(state(run_dir).attempts))
    logs.mkdir(parents=True, exist_ok=True)
    reports = [{"rank": rank, "exit_code": code, "stopped_by_agent": False} for rank, code in ranks.items()]
    (logs / f"node-{node}.json").write_text(json.dumps({"host": f"n{node}", "exit_code": 1, "ranks": reports, "out_of_time": 0}))
    for rank, (message, code) in (errors or {}).items():
        record = {"time": 1.0, "rank": rank, "exit_code": code, "type": "RuntimeError", "message": message, "traceback": f"trace of {rank}"}
        (logs / f"rank-{rank}.error.json").write_text(json.dumps(record))


def begin(run_dir: Path, place: SlurmPlace = PLACE) -> None:
    meeting = job.start(run_dir, place)
    assert meeting.attempt == len(state(run_dir).attempts) and meeting.address == "127.0.0.1" and 20000 <= meeting.port < 30000
    assert state(run_dir).job == "17" and state(run_dir).host == "n0" and state(run_dir).state == "starting"


def test_the_cause_is_found_on_another_node(run_dir: Path) -> None:
    begin(run_dir)
    leave(run_dir, 0, {0: 1, 1: 1}, {0: ("Connection closed by peer", 1), 1: ("Connection reset by peer", 1)})
    leave(run_dir, 1, {2: -9, 3: 1}, {3: ("the wheels came off", 1)})
    assert job.settle(run_dir, PLACE) is Verdict.AGAIN
    failure = state(run_dir).failure
    assert failure is not None and (failure.rank, failure.message) == (3, "rank 3: RuntimeError: the wheels came off")
    assert failure.traceback == "trace of 3" and state(run_dir).attempts[-1].restarted
    begin(run_dir)
    leave(run_dir, 0, {0: 1, 1: 1}, {0: ("Connection closed by peer", 1)})
    leave(run_dir, 1, {2: -9, 3: 1})
    assert job.settle(run_dir, PLACE) is Verdict.FAIL
    assert state(run_dir).state == "failed" and state(run_dir).exit_code == 1
    assert state(run_dir).attempts[-1].decision == "failed 2 times without getting past step 0"


def test_a_mistake_ends_it(run_dir: Path) -> None:
    begin(run_dir)
    leave(run_dir, 0, {0: 1, 1: 1}, {0: ("Connection closed by peer", 1)})
    leave(run_dir, 1, {2: 93, 3: 1}, {2: ("another corpus", 93)})
    assert job.settle(run_dir, PLACE) is Verdict.USER
    assert state(run_dir).exit_code == 93 and state(run_dir).failure.is_user_error


def test_a_node_that_says_nothing(run_dir: Path) -> None:
    begin(run_dir)
    (run_dir / "slurm" / "17.out").write_text("slurmstepd: node failure\n")
    leave(run_dir, 0, {0: 1, 1: 1}, {0: ("Connection closed by peer", 1)})
    assert job.settle(run_dir, PLACE) is Verdict.REQUEUE
    assert state(run_dir).state == "queued" and state(run_dir).exit_code is None
    begin(run_dir, NEXT)
    assert job.settle(run_dir, NEXT) is Verdict.FAIL
    failure = state(run_dir).failure
    assert failure is not None and failure.message.startswith("node 0 of the job, node 1 of the job ended without a word")
    assert failure.traceback == "slurmstepd: node failure"


def test_a_job_that_was_taken_away(run_dir: Path) -> None:
    """SLURM requeues it by itself; the next life closes the attempt, and gives up where that was one too many."""
    begin(run_dir)
    begin(run_dir)
    first = state(run_dir).attempts[0]
    assert first.exit_code == 1 and first.restarted and "a node went down" in first.failure.message
    with pytest.raises(EfflaunchError, match="failed 2 times without getting past step 0"):
        job.start(run_dir, PLACE)
    assert state(run_dir).state == "failed" and len(state(run_dir).attempts) == 2


@pytest.mark.parametrize(("cancelled", "verdict"), [(False, Verdict.REQUEUE), (True, Verdict.STOP)])
def test_stopped_and_saved(run_dir: Path, cancelled: bool, verdict: Verdict) -> None:
    begin(run_dir)
    write_state(run_dir, end_attempt(state(run_dir), exit_code=75, failure=None, last_step=4))
    if cancelled:
        cancel_file(run_dir, "17").touch()
    assert job.settle(run_dir, PLACE) is verdict
    assert state(run_dir).state == ("preempted" if cancelled else "queued")


def test_budgets_count_from_the_submission(run_dir: Path) -> None:
    for _ in range(2):
        begin(run_dir)
        verdict = job.settle(run_dir, PLACE)
    assert verdict is Verdict.FAIL
    job.queue(run_dir, job.read_run(run_dir).config)
    begin(run_dir)
    assert job.settle(run_dir, PLACE) is Verdict.REQUEUE and len(state(run_dir).attempts) == 3


def test_a_head_with_loopback_only_ends_the_job(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(host: str, interface: str | None) -> str:
        raise ConfigError("address of node n0", found="only 127.0.1.1", expected="another", hint="an interface")

    monkeypatch.setattr(job, "head_address", refuse)
    with pytest.raises(ConfigError, match=r"only 127\.0\.1\.1"):
        job.start(run_dir, PLACE)
    assert state(run_dir).exit_code == 93 and "127.0.1.1" in state(run_dir).failure.message


def test_another_efflaunch_in_the_directory(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job, "lock_in_time", lock_run)
    before = (run_dir / "state.json").read_text()
    lock = lock_run(run_dir)
    with pytest.raises(ConfigError, match="one efflaunch per run directory"):
        job.start(run_dir, PLACE)
    assert (run_dir / "state.json").read_text() == before and lock


def test_stops_are_kept_for_this_life_of_the_job(run_dir: Path) -> None:
    assert not stop_asked(run_dir, PLACE)
    stop_file(run_dir, "17", 1).touch()
    assert not stop_asked(run_dir, PLACE)
    stop_file(run_dir, "17", 0).touch()
    assert stop_asked(run_dir, PLACE)
    job.queue(run_dir, job.read_run(run_dir).config)
    assert not stop_asked(run_dir, PLACE)


def test_the_place(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for name, value in (("SLURM_JOB_ID", "17"), ("SLURM_NODEID", "0"), ("SLURM_JOB_NUM_NODES", "2"), ("SLURMD_NODENAME", "n0")):
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("SLURM_JOB_NODELIST", "n[0-1]")
    assert slurm_place() == PLACE
    monkeypatch.setenv("SLURM_RESTART_COUNT", "3")
    assert slurm_place().restart == 3 and slurm_place().word == "17" and slurm_place().life == "17.3"
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "15")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "2")
    assert slurm_place().word == "15_2"
    monkeypatch.delenv("SLURM_NODEID")
    assert job.main(["start", "nowhere"]) == 93
    assert "found no SLURM_NODEID; expected a task started by srun" in capsys.readouterr().err


def test_run_directories_are_their_owners(run_dir: Path) -> None:
    assert run_dir.stat().st_mode & 0o777 == 0o700
