"""What the batch script asks on the first node, without a SLURM: attempts begun, gathered and settled from the files nodes leave."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from efflaunch.errors import ConfigError, EfflaunchError
from efflaunch.launcher.config.compose import compose
from efflaunch.launcher.env import SlurmPlace, slurm_place
from efflaunch.launcher.nodes import node as node_module
from efflaunch.launcher.nodes.next_action import Verdict
from efflaunch.launcher.nodes.node_place import NodePlace
from efflaunch.launcher.rundir.lock import lock_run
from efflaunch.launcher.rundir.run_dir import attempt_dir, read_attempt
from efflaunch.launcher.rundir.state import Failure, RunState, end_attempt, read_state, write_state
from efflaunch.launcher.slurm import job
from efflaunch.launcher.slurm.files import cancel_file, stop_asked, stop_file
from efflaunch.tests.no_room import no_room

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
    run_state = read_state(run_dir)
    assert run_state is not None
    return run_state


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


def test_a_full_disk_is_named_and_the_exit_code_is_the_attempts(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Neither what nodes leave nor what `start` and `settle` write has room."""
    monkeypatch.setattr(job, "slurm_place", lambda: PLACE)
    monkeypatch.setattr(job, "_keep_stop_signals", lambda *given: None)
    monkeypatch.setattr(job, "lenient_output", lambda *given: None)
    with no_room():
        assert job.main(["start", str(run_dir), ""]) == 93
        assert f"{run_dir}/state.json: found No space left on device; expected room to write it" in capsys.readouterr().err
    begin(run_dir)
    write_state(run_dir, end_attempt(state(run_dir), exit_code=0, failure=None, last_step=4))
    with no_room():
        assert job.main(["settle", str(run_dir), ""]) == Verdict.DONE
        told = capsys.readouterr()
        assert "state.json cannot be written: No space left on device" in told.err and "finished, after step 4" in told.out
    assert job.main(["settle", str(run_dir), ""]) == Verdict.DONE and state(run_dir).state == "done"


def test_a_node_that_cannot_leave_its_report_says_so(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    begin(run_dir)
    agent: Any = SimpleNamespace(run_dir=run_dir, reports=[], out_of_time=0)
    place = NodePlace(node=1, num_nodes=2, name="n1", folder="slurm", exclude_key="", ends_with_others=True)
    attempt_dir(run_dir, 1).mkdir(parents=True, exist_ok=True)
    with no_room():
        node_module._report(agent, place, 1, 0)
    assert "logs/attempt-1/node-1.json cannot be written: No space left on device" in capsys.readouterr().err
    assert job.settle(run_dir, PLACE) is Verdict.REQUEUE


def test_a_node_that_cannot_be_left_out_for_want_of_room_is_kept(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for _ in range(2):
        known = state(run_dir)
        begin(run_dir)
        last = replace(state(run_dir).attempts[-1], blamed={"n1": "its device"})
        ended = end_attempt(replace(state(run_dir), attempts=(*known.attempts, last)), exit_code=1, failure=None, last_step=0)
        write_state(run_dir, ended)
    with no_room("exclude"):
        job.settle(run_dir, PLACE)
    assert "slurm/exclude cannot be written, no node is left out: No space left on device" in capsys.readouterr().err
    assert not state(run_dir).excluded


def test_stops_are_kept_for_this_life_of_the_job(run_dir: Path) -> None:
    assert not stop_asked(run_dir, PLACE)
    stop_file(run_dir, "17", 1).touch()
    assert not stop_asked(run_dir, PLACE)
    stop_file(run_dir, "17", 0).touch()
    assert stop_asked(run_dir, PLACE)
    job.queue(run_dir, job.read_run(run_dir).config)
    assert not stop_asked(run_dir, PLACE)


def test_the_place(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
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
    assert "found no SLURM_NODEID; expected a task started by srun" in capfd.readouterr().err


def test_run_directories_are_their_owners(run_dir: Path) -> None:
    assert run_dir.stat().st_mode & 0o777 == 0o700


def ranged(tmp_path: Path, *words: str) -> Path:
    """A run on two or three nodes."""
    base = ["+experiment=quickstart", "launcher=slurm", "launcher.nodes=2:3", "cluster.ranks_per_node=2", "launcher.max_restarts=1"]
    job.queue(tmp_path / "ranged", compose([*base, *words]))
    return tmp_path / "ranged"


THREE = replace(PLACE, num_nodes=3, hosts="n[0-2]")


def test_a_run_that_shrinks_and_grows(run_dir: Path, tmp_path: Path) -> None:
    """A node lost: on with the others in the same job; the next life of the job has three again."""
    wide = ranged(tmp_path)
    begin(wide, THREE)
    assert (state(wide).attempts[0].num_nodes, state(wide).attempts[0].hosts, state(wide).world_size) == (3, ("n0", "n1", "n2"), 6)
    for node in (0, 2):
        ranks = (2 * node, 2 * node + 1)
        leave(wide, node, dict.fromkeys(ranks, 1), dict.fromkeys(ranks, ("Connection closed by peer", 1)))
    assert job.settle(wide, THREE, "n[0,2]") is Verdict.AGAIN
    failure = state(wide).failure
    assert failure is not None and failure.message == "n1 ended without a word: lost or killed"
    assert state(wide).attempts[0].lost == ("n1",) and state(wide).attempts[0].blamed == {"n1": "ended without a word"}
    assert str(job.start(wide, THREE, "n[0,2]")).startswith("2@") and state(wide).attempts[1].hosts == ("n0", "n2")
    assert read_attempt(wide, 2).cluster.num_nodes == 2 and job.read_run(wide).config.cluster.num_nodes == 3
    write_state(wide, end_attempt(state(wide), exit_code=75, failure=None, last_step=4))
    assert job.settle(wide, THREE, "n[0,2]") is Verdict.REQUEUE
    begin(wide, replace(THREE, restart=1))
    assert state(wide).attempts[2].hosts == ("n0", "n1", "n2") and read_attempt(wide, 3) == job.read_run(wide).config


def test_a_lost_node_that_slurm_still_counts(run_dir: Path, tmp_path: Path) -> None:
    """Its agent left nothing: it is not used again in this life of the job."""
    wide = ranged(tmp_path)
    begin(wide, THREE)
    leave(wide, 0, {0: 1, 1: 1}, {0: ("Connection closed by peer", 1)})
    leave(wide, 1, {2: 1, 3: 1}, {2: ("Connection closed by peer", 1)})
    assert job.settle(wide, THREE, "n[0-2]") is Verdict.AGAIN
    begin(wide, THREE)
    assert state(wide).attempts[1].hosts == ("n0", "n1")


def test_too_few_are_left(run_dir: Path, tmp_path: Path) -> None:
    wide = ranged(tmp_path)
    begin(wide, THREE)
    assert job.settle(wide, THREE, "n0") is Verdict.REQUEUE
    with pytest.raises(EfflaunchError, match="not started: 1 node available, 2 needed at least; failed 2 times") as caught:
        job.start(wide, THREE, "n0")
    assert caught.value.exit_code == 1 and state(wide).state == "failed"


def test_a_job_without_the_nodes_it_needs_goes_back(run_dir: Path, tmp_path: Path) -> None:
    wide = ranged(tmp_path)
    with pytest.raises(EfflaunchError, match="not started: 1 node available, 2 needed at least; requeued 1 of 1") as caught:
        job.start(wide, THREE, "n0")
    assert caught.value.exit_code == Verdict.REQUEUE and state(wide).state == "queued"


def refuse(run_dir: Path, *unfit: str) -> None:
    """As the head does after a preflight that these did not pass."""
    failure = Failure(rank=-1, message="nodes that cannot do their part", traceback="", log="slurm", is_user_error=True)
    run_state = end_attempt(state(run_dir), exit_code=93, failure=failure, last_step=0)
    last = replace(run_state.attempts[-1], blamed=dict.fromkeys(unfit, "no GPU"))
    write_state(run_dir, replace(run_state, attempts=(*run_state.attempts[:-1], last)))


def test_a_node_that_is_not_fit_is_left_out(run_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(job, "partition_nodes", lambda partition: {"n0", "n1", "n2"})
    begin(run_dir)
    refuse(run_dir, "n1")
    assert job.settle(run_dir, PLACE) is Verdict.REQUEUE
    assert state(run_dir).excluded == {"n1": "failed the preflight: no GPU"} and (run_dir / "slurm" / "exclude").read_text() == "n1"
    assert "n1 is left out from now on: failed the preflight: no GPU" in capsys.readouterr().out
    begin(run_dir, replace(NEXT, hosts="n[0,2]"))
    assert state(run_dir).attempts[-1].hosts == ("n0", "n2")
    job.queue(run_dir, job.read_run(run_dir).config)
    assert not state(run_dir).excluded and not (run_dir / "slurm" / "exclude").exists()


def test_an_unfit_node_with_no_other_to_take_its_place(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job, "partition_nodes", lambda partition: {"n0", "n1"})
    begin(run_dir)
    refuse(run_dir, "n1")
    assert job.settle(run_dir, PLACE) is Verdict.USER and state(run_dir).exit_code == 93 and not state(run_dir).excluded


def test_leaving_out_can_be_turned_off(run_dir: Path, tmp_path: Path) -> None:
    wide = ranged(tmp_path, "launcher.slurm.max_excluded=0")
    begin(wide, THREE)
    refuse(wide, "n1")
    assert job.settle(wide, THREE, "n[0-2]") is Verdict.USER


def test_an_unfit_node_of_a_range_is_left_out_at_once(run_dir: Path, tmp_path: Path) -> None:
    wide = ranged(tmp_path)
    begin(wide, THREE)
    refuse(wide, "n1")
    assert job.settle(wide, THREE, "n[0-2]") is Verdict.AGAIN
    begin(wide, THREE)
    assert state(wide).attempts[-1].hosts == ("n0", "n2")


def test_the_first_node_is_left_out(run_dir: Path, tmp_path: Path) -> None:
    """Where the batch script lives: the job has to go back, however many are left."""
    wide = ranged(tmp_path)
    begin(wide, THREE)
    refuse(wide, "n0")
    assert job.settle(wide, THREE, "n[0-2]") is Verdict.REQUEUE and state(wide).excluded.keys() == {"n0"}


def test_a_job_of_another_size_than_asked_for(run_dir: Path) -> None:
    with pytest.raises(ConfigError, match=r"cluster\.num_nodes: found a job of 3 nodes; expected 2"):
        job.start(run_dir, THREE)
    assert state(run_dir).exit_code == 93
