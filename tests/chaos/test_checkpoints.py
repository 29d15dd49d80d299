"""Kills, damage and failing storage against checkpoints, with real processes; `efflaunch.bench.chaos` is the long version."""

from __future__ import annotations

import gc
import os
import select
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch.distributed as dist

from efflaunch.bench.chaos import DAMAGES, State, fault_trials, kill_trials
from efflaunch.checkpoint import files
from efflaunch.checkpoint.engine import CheckpointEngine
from efflaunch.checkpoint.faults import COMMIT_POINTS, FLUSHER_POINTS
from efflaunch.checkpoint.verify import damage
from efflaunch.tests.chaos.shim import build_shim
from efflaunch.tests.limits import ENDS_S, wait_until
from efflaunch.tests.ranks import RankPool


@pytest.fixture(scope="module")
def shim(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_shim(tmp_path_factory.mktemp("shim"))


def test_killed_processes_lose_nothing_durable_and_tear_nothing(tmp_path: Path) -> None:
    tally = kill_trials(tmp_path / "run", 5, seed=4)
    assert tally.problems == [] and tally.done == 5


def test_a_kill_at_every_named_point_loses_nothing_durable(tmp_path: Path) -> None:
    """Before and after each fsync and each rename, in the flusher and in the rank that commits."""
    points = (*FLUSHER_POINTS, *COMMIT_POINTS)
    tally = kill_trials(tmp_path / "run", len(points), seed=7, points=points)
    assert tally.problems == []
    assert tally.by_kind == {f"kill at {point}": 1 for point in points}


def test_killed_keepers_and_ranks_lose_nothing_with_replicas(tmp_path: Path) -> None:
    tally = kill_trials(tmp_path / "run", 6, seed=5, replica=True)
    assert tally.problems == [] and tally.from_memory >= 1


def test_damage_on_disk_is_named_and_never_restored(tmp_path: Path) -> None:
    tally = fault_trials(tmp_path, 40, seed=2)
    assert tally.problems == [] and tally.done == 40
    assert {kind.removeprefix("fault ") for kind in tally.by_kind} == set(DAMAGES)


def save_three(state: State, engine: CheckpointEngine) -> None:
    """Steps 1, 2 and 3, each to its end, and no more."""
    for step in range(1, 4):
        engine.wait_for_snapshot()
        state.set(step)
        engine.save(step, {})
        engine.wait()
    engine.close()


@pytest.mark.parametrize(
    ("mode", "at", "failures"),
    [("short", 1, 0), ("eintr", 1, 0), ("slow", 100, 0), ("eio", 3, 1), ("fsync", 1, 1), ("fsync", 5, 1)],
    ids=str,
)
def test_storage_that_fails_or_writes_less_than_asked(
    tmp_path: Path, shim: Path, monkeypatch: pytest.MonkeyPatch, mode: str, at: int, failures: int
) -> None:
    # Only the flusher is started with it.
    monkeypatch.setenv("LD_PRELOAD", str(shim))
    monkeypatch.setenv("SHIM_MODE", mode)
    monkeypatch.setenv("SHIM_AT", str(at))
    state = State()
    engine = state.engine(tmp_path, keep_last=9)
    save_three(state, engine)
    errors = [report.error for report in state.reports if report.error is not None]
    assert len(errors) == failures and all("Input/output error" in error for error in errors), errors
    infos = files.scan(tmp_path)
    assert len(infos) == 3 - failures and all(damage(info.path) == [] for info in infos)
    restored = state.engine(tmp_path).restore()
    assert restored is not None and state.wrong(restored.step) == ""


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(folder)], capture_output=True, check=False).returncode:
        pytest.skip("mounting needs root")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_disk_that_turns_read_only_and_back(disk: Path) -> None:
    state = State()
    engine = state.engine(disk / "checkpoints")
    for step in range(1, 4):
        subprocess.run(["mount", "-o", f"remount,{'ro' if step == 2 else 'rw'}", str(disk)], check=True)
        engine.wait_for_snapshot()
        state.set(step)
        engine.save(step, {})
        engine.wait()
    first, second, third = (report.error for report in state.reports)
    assert first is None and third is None and second is not None and "Read-only file system" in second
    engine.close()
    restored = state.engine(disk / "checkpoints").restore()
    assert restored is not None and restored.step == 3 and state.wrong(3) == ""


def test_a_disk_that_is_nearly_full_keeps_what_it_has(disk: Path) -> None:
    with (disk / "other").open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, 7 << 20)
    state = State()
    engine = state.engine(disk / "checkpoints", keep_last=99)
    for step in range(1, 12):
        engine.wait_for_snapshot()
        state.set(step)
        engine.save(step, {})
        engine.wait()
    errors = [report.error for report in state.reports]
    num_good = errors.index(next(filter(None, errors)))
    assert num_good >= 1 and all("No space left on device" in (error or "") for error in errors[num_good:])
    (disk / "other").unlink()
    state.set(12)
    engine.save(12, {})
    engine.wait()
    engine.close()
    assert [info.step for info in files.scan(disk / "checkpoints")] == [*range(1, num_good + 1), 12]
    assert all(damage(info.path) == [] for info in files.scan(disk / "checkpoints"))


def test_a_save_while_older_ones_are_being_removed(tmp_path: Path) -> None:
    state = State()
    engine = state.engine(tmp_path, fault=f"in_prune=until:{tmp_path / 'go'}", keep_last=1)
    for step in range(1, 6):
        engine.wait_for_snapshot()
        state.set(step)
        engine.save(step, {})
    (tmp_path / "go").touch()
    engine.wait()
    assert [report.error for report in state.reports] == [None] * 5
    assert [info.step for info in files.scan(tmp_path)] == [5]
    engine.close()
    restored = state.engine(tmp_path).restore()
    assert restored is not None and state.wrong(5) == ""


@pytest.mark.parametrize(("victim", "point"), [(1, "before_vote"), (1, "after_vote"), (0, "after_vote"), (0, "before_rename")], ids=str)
def test_a_rank_that_is_stopped_in_the_middle_of_the_votes(tmp_path: Path, victim: int, point: str) -> None:
    """It goes on some time after the others have given up; nothing half-decided counts, and the next save works."""
    with RankPool() as pool:
        results = pool.run(_stopped_while_voting, tmp_path, victim, point, ranks=2)
    for errors in results:
        assert len(errors) == 3 and errors[0] is None and errors[2] is None, errors
        if victim == 0 or point == "before_vote":
            assert (errors[1] is None) == (victim == 0), errors
    assert [info.step for info in files.scan(tmp_path)][-1] == 3
    assert all(damage(info.path) == [] for info in files.scan(tmp_path))


def _stopped_while_voting(folder: Path, victim: int, point: str) -> list[str | None]:
    state = State()
    mine = dist.get_rank() == victim
    go = folder / "go"
    waker = subprocess.Popen(["sh", "-c", WAKE, "sh", str(os.getpid()), str(go)]) if mine else None
    engine = state.engine(folder, keep_last=9, fault=f"{point}=stop@2" if mine else "")
    for step in range(1, 4):
        # Rank 0 gives the second save up soon where the other stops; the other way round it is given a minute (commit._ANSWER_S).
        if engine._committer is not None and victim == 1:
            engine._committer.timeout_s = 0.5 if step == 2 else engine.config.commit_timeout_s
        engine.wait_for_snapshot()
        state.set(step)
        engine.save(step, {})
        while not mine and victim == 1 and len(state.reports) < step:
            engine._deliver(block=True)
        if step == 2 and not mine:
            go.touch()
        engine.wait()
    engine.close()
    if waker is not None:
        waker.wait()
    return [report.error for report in state.reports]


WAKE = "until grep -q '^State:.T' /proc/$1/status && test -e $2; do sleep 0.1; done; sleep 1; kill -CONT $1"


def test_a_disk_that_cannot_be_read_falls_back_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = State()
    engine = state.engine(tmp_path)
    for step in (1, 2):
        engine.wait_for_snapshot()
        state.set(step)
        engine.save(step, {})
        engine.wait()
    engine.close()
    real = os.preadv

    def fails(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        if "step-00000002" in os.readlink(f"/proc/self/fd/{descriptor}") and "distcp" in os.readlink(f"/proc/self/fd/{descriptor}"):
            raise OSError(5, "Input/output error")
        return real(descriptor, buffers, offset)

    monkeypatch.setattr(os, "preadv", fails)
    restored = state.engine(tmp_path).restore()
    assert restored is not None and restored.step == 1 and state.wrong(1) == ""
    assert "step-00000002" in restored.skipped[0] and "Input/output error" in restored.skipped[0]


def test_older_checkpoints_are_deleted_no_faster_than_asked_and_training_does_not_wait(tmp_path: Path) -> None:
    state = State()
    # A byte a second: nothing of it would be gone before the end of time.
    engine = state.engine(tmp_path, keep_last=1, delete_bytes_per_s=1)
    for step in range(1, 4):
        engine.wait_for_snapshot()
        state.set(step)
        engine.save(step, {})
        while len(state.reports) < step:
            engine.wait_for_snapshot()
        if step == 2:
            # A moment after the commit that was reported; then it stays.
            wait_until((tmp_path / "step-00000001.trash").is_dir)
    # Somebody waits, so there is no pause any more.
    engine.wait()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000003"]
    engine.close()


def test_an_engine_that_is_dropped_leaves_no_flusher_behind(tmp_path: Path) -> None:
    state = State()
    engine = state.engine(tmp_path)
    engine.save(1, {})
    engine.wait()
    pid = engine.flusher_pid
    assert pid is not None
    descriptor = os.pidfd_open(pid)
    del engine
    gc.collect()
    assert select.select([descriptor], [], [], ENDS_S)[0]
    os.close(descriptor)
