"""Snapshots in memory that outlives the ranks: who keeps what, what a restart finds, and everything that may be wrong with it."""

from __future__ import annotations

import logging
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from efflaunch.bench.chaos import State
from efflaunch.checkpoint import files
from efflaunch.checkpoint.config import Replica
from efflaunch.checkpoint.engine import CheckpointEngine
from efflaunch.checkpoint.replica import replicas as replicas_module
from efflaunch.checkpoint.replica.keeper_process import send
from efflaunch.checkpoint.replica.plan import StoredImage, keeper_bytes, keepers_of, solve_set
from efflaunch.checkpoint.replica.stream import Address, GoneError, connect, connect_here
from efflaunch.checkpoint.restore import Restored
from efflaunch.checkpoint.sizes import replica_bytes
from efflaunch.tests.limits import ENDS_S
from efflaunch.tests.ranks import RankPool

NODES = [["a"], ["a", "a"], ["a", "b"], ["a", "a", "b", "b"], ["a", "b", "c"], ["a", "a", "a", "b"]]


@pytest.fixture(scope="module")
def pool() -> Iterator[RankPool]:
    with RankPool() as pool:
        yield pool


@pytest.mark.parametrize("nodes", NODES, ids=str)
def test_every_image_survives_the_loss_of_any_one_node_where_there_are_several(nodes: list[str]) -> None:
    for rank, node in enumerate(nodes):
        kept = keepers_of(rank, nodes)
        assert len(set(kept)) == len(kept) == (2 if len(set(nodes)) > 1 else 1)
        if len(set(nodes)) > 1:
            assert {nodes[keeper] for keeper in kept} > {node}
        elif len(nodes) > 1:
            assert kept != (rank,)


@pytest.mark.parametrize(("nodes", "ranks_per_node"), [(["a"], 1), (["a", "a"], 2), (["a", "b"], 1), (["a", "a", "b", "b"], 2)])
def test_the_ledger_counts_what_keepers_hold(nodes: list[str], ranks_per_node: int) -> None:
    for node in set(nodes):
        expected = replica_bytes(1000, ranks_per_node, several_nodes=len(set(nodes)) > 1)
        assert keeper_bytes(node, nodes, [1000] * len(nodes)) == expected


def _held(step: int, rank: int, *, manifest: str = "m", attempt: str = "", node: str = "a", world_size: int = 2) -> StoredImage:
    return StoredImage(attempt or f"s-{step}", step, rank, world_size, manifest, Address(node, "", "", 0, ""))


def test_the_newest_whole_set_is_taken_and_newer_ones_are_named() -> None:
    images = [_held(1, 0), _held(1, 1), _held(2, 0), _held(2, 1, manifest=""), _held(3, 1), _held(1, 1, node="b")]
    leftover, missing = solve_set(images)
    assert leftover is not None and (leftover.step, leftover.attempt, leftover.manifests) == (1, "s-1", ("m", "m"))
    assert [[address.node for address in keepers] for keepers in leftover.keepers] == [["a"], ["a", "b"]]
    assert missing == ["step 3: no image of rank 0", "step 2: no image of rank 1"]


def test_images_of_two_attempts_make_no_set() -> None:
    assert solve_set([_held(1, 0, attempt="x-1"), _held(1, 1, attempt="y-1")])[0] is None
    assert solve_set([]) == (None, [])


def _engine(folder: Path, *, nodes: int = 1, fault: str = "", **changes: Any) -> tuple[State, CheckpointEngine]:
    """`nodes`: ranks are spread over that many, by name."""
    state = State()
    rank = dist.get_rank() if dist.is_initialized() else 0
    engine = state.engine(folder, fault=fault, node=f"node{rank % nodes}", replica=Replica.PEER, **changes)
    return state, engine


def _step(state: State, engine: CheckpointEngine, step: int) -> None:
    engine.wait_for_snapshot()
    state.set(step)
    engine.save(step, {"step": step})
    engine.wait(replicated=True)


def _crash(engine: CheckpointEngine) -> None:
    """What a killed rank leaves: its keeper."""
    replicas, engine._replicas = engine._replicas, None
    assert replicas is not None
    if dist.is_initialized():
        dist.barrier()
    replicas.close(stop=False)
    engine.close()


def _life(folder: Path, steps: int, nodes: int) -> int | None:
    state, engine = _engine(folder, nodes=nodes, keep_last=99)
    assert engine.restore() is None
    for step in range(1, steps + 1):
        _step(state, engine, step)
    replicated = engine.replicated
    _crash(engine)
    return replicated


def _again(folder: Path, nodes: int) -> tuple[Restored, str]:
    state, engine = _engine(folder, nodes=nodes)
    restored = engine.restore()
    assert restored is not None
    wrong = state.wrong(restored.step)
    # And it goes on from there.
    _step(state, engine, restored.step + 1)
    assert engine.replicated == restored.step + 1
    _barrier_close(engine)
    return restored, wrong


def _barrier_close(engine: CheckpointEngine) -> None:
    if dist.is_initialized():
        dist.barrier()
    engine.close()


@pytest.mark.parametrize(("ranks", "nodes"), [(1, 1), (2, 1), (2, 2), (3, 2)])
def test_a_restart_resumes_from_memory_though_the_disk_has_nothing_of_it(pool: RankPool, tmp_path: Path, ranks: int, nodes: int) -> None:
    assert pool.run(_life, tmp_path, 3, nodes, ranks=ranks) == [3] * ranks
    for step in (2, 3):
        shutil.rmtree(files.step_path(tmp_path, step))
    for restored, wrong in pool.run(_again, tmp_path, nodes, ranks=ranks):
        assert (restored.step, wrong, restored.is_durable, restored.skipped) == (3, "", False, ())
        assert restored.origin.startswith("the memory of node0")
    assert files.scan(tmp_path)[-1].step == 4


def test_another_number_of_ranks_restarts_from_memory_too(pool: RankPool, tmp_path: Path) -> None:
    pool.run(_life, tmp_path, 2, 1, ranks=2)
    shutil.rmtree(files.step_path(tmp_path, 2))
    for restored, wrong in pool.run(_again, tmp_path, 1, ranks=3):
        assert (restored.step, wrong, restored.same_layout) == (2, "", False)


def test_what_is_on_disk_too_is_durable_and_a_newer_one_there_is_taken(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    _life(tmp_path, 2, 1)
    state, engine = _engine(tmp_path)
    restored = engine.restore()
    assert restored is not None and restored.is_durable and restored.origin.startswith("the memory")
    _crash(engine)
    # A run without replicas goes on, and its checkpoint is newer.
    other = State()
    plain = other.engine(tmp_path)
    other.set(5)
    plain.save(5, {})
    plain.wait()
    plain.close()
    state, engine = _engine(tmp_path)
    restored = engine.restore()
    assert restored is not None and restored.step == 5 and state.wrong(5) == "" and restored.origin == str(files.step_path(tmp_path, 5))
    assert "is older than step 5 on disk" in caplog.text
    # What was passed over is gone, whatever comes.
    _crash(engine)
    shutil.rmtree(files.step_path(tmp_path, 5))
    state, engine = _engine(tmp_path)
    restored = engine.restore()
    assert restored is not None and restored.step == 2 and restored.origin == str(files.step_path(tmp_path, 2))
    engine.close()


def _keepers(engine: CheckpointEngine) -> Any:
    assert engine._replicas is not None and engine._replicas.keeper is not None
    return engine._replicas.keeper


def _spoil(folder: Path, nodes: int, victims: list[int]) -> None:
    """One byte of each victim's keeper's images changes."""
    _state, engine = _engine(folder, nodes=nodes)
    leftover = engine._replicas.leftover if engine._replicas is not None else None
    assert leftover is not None
    for rank, keepers in enumerate(leftover.keepers):
        for address in keepers:
            if dist.get_rank() in victims and address.path == _keepers(engine).address.path:
                question = {"do": "spoil", "attempt": leftover.attempt, "rank": rank, "file": f"__{rank}_0.distcp", "offset": 40000}
                assert send(Path(address.path), question) is not None
    _crash(engine)


def test_a_damaged_image_is_read_from_its_other_copy(pool: RankPool, tmp_path: Path) -> None:
    pool.run(_life, tmp_path, 2, 2, ranks=2)
    shutil.rmtree(files.step_path(tmp_path, 2))
    pool.run(_spoil, tmp_path, 2, [0], ranks=2)
    for restored, wrong in pool.run(_again, tmp_path, 2, ranks=2):
        assert (restored.step, wrong, restored.skipped) == (2, "", ())


def test_damage_in_every_copy_is_named_and_the_disk_is_used(pool: RankPool, tmp_path: Path) -> None:
    pool.run(_life, tmp_path, 2, 1, ranks=2)
    shutil.rmtree(files.step_path(tmp_path, 2))
    pool.run(_spoil, tmp_path, 1, [0], ranks=2)
    for restored, wrong in pool.run(_again, tmp_path, 1, ranks=2):
        assert (restored.step, wrong, restored.is_durable) == (1, "", True)
        assert len(restored.skipped) == 1 and "the memory of node0 (step 2)" in restored.skipped[0]
        assert "not what was written" in restored.skipped[0]


def _kill_keeper(folder: Path, nodes: int, victims: list[int]) -> None:
    _state, engine = _engine(folder, nodes=nodes)
    if dist.get_rank() in victims:
        os.kill(_keepers(engine).pid, signal.SIGKILL)
    _crash(engine)


@pytest.mark.parametrize(("nodes", "victims", "step"), [(2, [0], 2), (2, [0, 1], 1), (1, [1], 1)], ids=str)
def test_a_node_that_lost_its_memory_reads_the_peers_copy_or_the_disk(
    pool: RankPool, tmp_path: Path, nodes: int, victims: list[int], step: int
) -> None:
    pool.run(_life, tmp_path, 2, nodes, ranks=2)
    shutil.rmtree(files.step_path(tmp_path, 2))
    pool.run(_kill_keeper, tmp_path, nodes, victims, ranks=2)
    for restored, wrong in pool.run(_again, tmp_path, nodes, ranks=2):
        assert (restored.step, wrong) == (step, "")


def _keeper_dies_between(folder: Path) -> tuple[list[int | None], list[str | None]]:
    errors: list[str | None] = []
    state = State()
    engine = state.engine(folder, node="n", replica=Replica.PEER)
    engine._on_replica = lambda report: errors.append(report.error)
    seen: list[int | None] = []
    for step in range(1, 6):
        _step(state, engine, step)
        seen.append(engine.replicated)
        dist.barrier()
        if step == 2 and dist.get_rank() == 1:
            os.kill(_keepers(engine).pid, signal.SIGKILL)
        dist.barrier()
    _barrier_close(engine)
    return seen, errors


def test_a_keeper_that_dies_is_named_and_replaced_while_training_continues(pool: RankPool, tmp_path: Path) -> None:
    for seen, errors in pool.run(_keeper_dies_between, tmp_path, ranks=2):
        assert seen[:2] == [1, 2] and seen[2] == 2 and seen[-1] == 5, seen
        assert errors[2] is not None and "the keeper at n" in errors[2] and "(rank 0)" in errors[2]
        assert errors[0] is None and errors[-1] is None and len(errors) == 5
    assert [info.step for info in files.scan(tmp_path)] == [4, 5]


def _stopped_keeper(folder: Path) -> list[tuple[int, str | None]]:
    replies: list[tuple[int, str | None]] = []
    state, engine = _engine(folder)
    engine._on_replica = lambda report: replies.append((report.step, report.error))
    _step(state, engine, 1)
    # From here on only replicas are given up soon: nothing else may wait for a keeper that hangs.
    assert engine._replicas is not None
    engine._replicas.timeout_s = 0.5
    dist.barrier()
    victim = _keepers(engine).pid
    if dist.get_rank() == 1:
        os.kill(victim, signal.SIGSTOP)
    dist.barrier()
    for step in (2, 3):
        engine.wait_for_snapshot()
        state.set(step)
        engine.save(step, {"step": step})
    # Training and storage do not wait for a keeper that hangs.
    engine.wait()
    durable = [report.step for report in state.reports if report.error is None]
    engine.wait(replicated=True)
    dist.barrier()
    if dist.get_rank() == 1:
        os.kill(victim, signal.SIGCONT)
    _barrier_close(engine)
    assert durable == [1, 2, 3]
    return replies


def test_a_keeper_that_hangs_costs_replicas_and_nothing_else(pool: RankPool, tmp_path: Path) -> None:
    for replies in pool.run(_stopped_keeper, tmp_path, ranks=2):
        assert replies[0] == (1, None) and {step for step, error in replies[1:] if error is not None} == {2, 3}


@pytest.mark.parametrize("fault", ["opened=EIO@2", "chunk=EIO@40"])
def test_a_save_that_fails_leaves_no_replica_and_the_one_before_stays(tmp_path: Path, fault: str) -> None:
    state, engine = _engine(tmp_path, fault=fault, keep_last=99)
    replicated = 0
    for step in range(1, 9):
        _step(state, engine, step)
        if state.reports[-1].error is None:
            replicated = step
        assert engine.replicated == replicated, step
    assert [report.error is not None for report in state.reports].count(True) == 1 and state.reports[0].error is None
    engine.close()


def test_too_little_memory_is_logged_and_training_continues(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(replicas_module, "free_memory", lambda: 1000)
    state, engine = _engine(tmp_path)
    _step(state, engine, 1)
    assert engine.replicated is None and state.reports[0].error is None
    assert "no replicas in memory (checkpoint.replica): they need" in caplog.text and "1000 B are free there" in caplog.text
    engine.close()


def test_a_keeper_ends_with_the_run_and_leaves_nothing(tmp_path: Path) -> None:
    state, engine = _engine(tmp_path)
    keeper = _keepers(engine)
    folder = Path(keeper.address.path).parent
    _step(state, engine, 1)
    engine.close()
    assert not _is_alive(keeper.pid) and not folder.exists()


def _is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"
    except FileNotFoundError:
        return False


AGENT = """
import subprocess, sys
child = subprocess.Popen([sys.executable, "-c", sys.argv[1], sys.argv[2]], stdout=subprocess.PIPE, text=True)
print(child.stdout.readline().strip(), flush=True)
sys.stdin.read()
"""
RANK = """
import sys, time
from pathlib import Path
from efflaunch.bench.chaos import State
from efflaunch.checkpoint.config import Replica
engine = State().engine(Path(sys.argv[1]), node="agent", replica=Replica.PEER)
print(engine._replicas.keeper.pid, flush=True)
time.sleep(600)
"""


def test_a_keeper_ends_when_the_agent_does(tmp_path: Path) -> None:
    agent = subprocess.Popen(
        [sys.executable, "-c", AGENT, RANK, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    assert agent.stdout is not None
    keeper = int(agent.stdout.readline())
    assert _is_alive(keeper)
    descriptor = os.pidfd_open(keeper)
    os.killpg(agent.pid, signal.SIGKILL)
    agent.wait()
    import select

    assert select.select([descriptor], [], [], ENDS_S)[0]
    os.close(descriptor)


def test_a_stranger_gets_no_answer(tmp_path: Path) -> None:
    _state, engine = _engine(tmp_path)
    address = _keepers(engine).address
    stranger = Address("elsewhere", address.path, address.host, address.port, "wrong")
    with pytest.raises(GoneError, match="not a caller of this run"):
        connect(stranger, "here", 10.0)
    other = connect(Address("elsewhere", address.path, address.host, address.port, address.token), "here", 10.0)
    assert other.ask({"do": "list"})["images"] == []
    with pytest.raises(GoneError, match="is no question"):
        other.ask({"do": "answer"})
    other.close()
    assert Path(address.path).parent.stat().st_mode & 0o777 == 0o700
    engine.close()


def test_an_older_life_is_refused_and_a_torn_image_never_counts(tmp_path: Path) -> None:
    state, engine = _engine(tmp_path)
    _step(state, engine, 1)
    keeper = _keepers(engine)
    stream = connect_here(Path(keeper.address.path), 10.0)
    begin = {"do": "begin", "step": 9, "rank": 0, "world_size": 1, "files": [["f", 8]], "agreed": ""}
    with pytest.raises(GoneError, match="a newer life of the run has begun"):
        stream.ask({**begin, "attempt": "old-1"})
    session = engine._peers.session
    stream.ask({**begin, "attempt": f"{session}-9"})
    stream.send({"do": "chunk", "file": "f", "offset": 0}, b"12345678")
    manifest = (
        b'{"step": 9, "attempt": "x", "rank": 0, "world_size": 1, "chunk_bytes": 8,'
        b' "files": [{"name": "f", "num_bytes": 8, "chunks": ["0000000000000000"]}]}'
    )
    with pytest.raises(GoneError, match="f of rank 0 did not arrive as it was sent"):
        stream.ask({"do": "end"}, manifest)
    assert all(image["step"] != 9 for image in stream.ask({"do": "list"})["images"])
    stream.close()
    engine.close()


def test_a_flusher_continues_sending_for_a_killed_trainer(pool: RankPool, tmp_path: Path) -> None:
    with pytest.raises(Exception, match="died"):
        pool.run(_die_after_snapshot, tmp_path, ranks=2)
    for restored, wrong in pool.run(_again, tmp_path, 1, ranks=2):
        assert (restored.step, wrong) == (2, "")


def _die_after_snapshot(folder: Path) -> None:
    state, engine = _engine(folder)
    _step(state, engine, 1)
    engine.wait_for_snapshot()
    state.set(2)
    engine.save(2, {"step": 2})
    attempt: Any = engine._latest
    attempt.copied.wait()
    dist.barrier()
    os.kill(os.getpid(), signal.SIGKILL)


def test_the_log_never_calls_a_replica_durable(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        state, engine = _engine(tmp_path)
        _step(state, engine, 1)
        engine.close()
    line = next(text for text in caplog.messages if "replicated" in text)
    assert "checkpoint of step 1: replicated in the memory of this host after" in line and "that alone is not durable" in line
