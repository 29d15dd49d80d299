"""Saving behind the training: what is saved is the state at the call, whatever happens after; and what a save meets on its way."""

from __future__ import annotations

import itertools
import logging
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from efflaunch.bench.chaos import State
from efflaunch.checkpoint import files
from efflaunch.checkpoint.config import CheckpointConfig, Interval, OnBusy, OnSaveError
from efflaunch.checkpoint.engine import CheckpointEngine
from efflaunch.checkpoint.interval import solve_interval
from efflaunch.checkpoint.verify import damage
from efflaunch.errors import CheckpointError
from efflaunch.launcher.agent.procfs import process_state
from efflaunch.parallel.sharding.fsdp2 import Fsdp2State
from efflaunch.tests.limits import wait_until
from efflaunch.tests.ranks import RankPool


@pytest.fixture(scope="module")
def pool() -> Iterator[RankPool]:
    with RankPool() as pool:
        yield pool


def check_saved(folder: Path, step: int) -> None:
    """What is restored is all of `step`."""
    state = State()
    engine = state.engine(folder)
    restored = engine.restore()
    assert restored is not None and restored.step == step, (restored, step)
    assert state.wrong(step) == ""
    engine.close()


def _steps(engine: CheckpointEngine, state: State, first: int, last: int) -> None:
    """A run that saves at every step and changes everything as soon as it may."""
    for step in range(first, last + 1):
        engine.wait_for_snapshot()
        state.set(step)
        engine.save(step, {"step": step})


@pytest.mark.parametrize("pool_bytes", [None, 1])
@pytest.mark.parametrize("ranks", [1, 2])
def test_every_save_holds_its_own_step_though_the_next_one_comes_at_once(
    pool: RankPool, tmp_path: Path, ranks: int, pool_bytes: int | None
) -> None:
    assert all(pool.run(_many_saves, tmp_path, pool_bytes, ranks=ranks))


def _many_saves(folder: Path, pool_bytes: int | None) -> bool:
    state = State()
    engine = state.engine(folder, keep_last=9, pool_bytes=pool_bytes)
    _steps(engine, state, 1, 6)
    engine.wait_for_snapshot()
    state.set(99)
    engine.wait()
    engine.close()
    assert [(report.step, report.error) for report in state.reports] == [(step, None) for step in range(1, 7)]
    for step in range(1, 7):
        restored = State()
        from efflaunch.checkpoint.reader import Reader
        from efflaunch.parallel.sharding.parts import pieces

        tensors = Fsdp2State(restored.model, restored.optimizer).tensors()
        Reader(files.step_path(folder, step)).read(tensors, pieces)
        assert restored.wrong(step) == ""
    return True


def test_save_is_back_long_before_it_is_durable(tmp_path: Path) -> None:
    """Storage does not get on before the state has changed."""
    state = State()
    engine = state.engine(tmp_path, fault=f"before_fsync=until:{tmp_path / 'go'}")
    state.set(1)
    engine.save(1, {})
    engine.wait_for_snapshot()
    state.set(2)
    assert not files.scan(tmp_path) and not state.reports
    (tmp_path / "go").touch()
    engine.wait()
    report = state.reports[0]
    assert report.error is None and min(report.snapshot_s, report.save_s, report.stall_s) > 0
    check_saved(tmp_path, 1)


def test_what_a_forward_may_change_is_saved_as_it_was(tmp_path: Path) -> None:
    state = State()
    engine = state.engine(tmp_path, pool_bytes=1, fault=f"opened=until:{tmp_path / 'go'}")
    state.set(1)
    engine.save(1, {})
    # As a forward does, before the copies are made.
    state.model.get_buffer("count").fill_(7)
    (tmp_path / "go").touch()
    engine.wait_for_snapshot()
    engine.wait()
    check_saved(tmp_path, 1)


def test_a_state_of_another_shape_is_planned_anew(tmp_path: Path) -> None:
    state = State()
    engine = state.engine(tmp_path)
    states = dict(state.optimizer.state)
    state.optimizer.state.clear()
    engine.save(1, {})
    state.optimizer.state.update(states)
    state.set(2)
    engine.save(2, {})
    for parameter in state.model.parameters():
        # Another storage of the same shape: sources are looked up anew.
        state.optimizer.state[parameter]["exp_avg"] = torch.zeros_like(parameter).detach()
    engine.wait_for_snapshot()
    state.set(3)
    engine.save(3, {})
    engine.wait()
    check_saved(tmp_path, 3)


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_save_that_comes_too_early_is_skipped_but_the_last_one_never(pool: RankPool, tmp_path: Path, ranks: int) -> None:
    assert pool.run(_skipping, tmp_path, ranks=ranks) == [[1, 3]] * ranks


def _skipping(folder: Path) -> list[int]:
    state = State()
    engine = state.engine(folder, on_busy=OnBusy.SKIP, fault=f"before_fsync=until:{folder / 'go'}")
    _steps(engine, state, 1, 2)
    engine.wait_for_snapshot()
    state.set(3)
    engine.save(3, {}, final=True)
    (folder / "go").touch()
    engine.wait()
    engine.close()
    return [report.step for report in state.reports]


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_newer_save_supersedes_one_that_is_not_yet_voted_for(pool: RankPool, tmp_path: Path, ranks: int) -> None:
    assert pool.run(_superseding, tmp_path, ranks=ranks) == [([2], [2])] * ranks


def _superseding(folder: Path) -> tuple[list[int], list[int]]:
    state = State()
    last = not dist.is_initialized() or dist.get_rank() == dist.get_world_size() - 1
    engine = state.engine(folder, on_busy=OnBusy.SUPERSEDE, fault=f"before_fsync=until:{folder / 'go'}" if last else "")
    _steps(engine, state, 1, 1)
    engine.wait_for_snapshot()
    state.set(2)
    engine.save(2, {})
    if last:
        (folder / "go").touch()
    engine.wait()
    engine.close()
    return [report.step for report in state.reports if report.error is None], [info.step for info in files.scan(folder)]


def test_a_dead_flusher_is_replaced_and_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    state = State()
    engine = state.engine(tmp_path)
    _steps(engine, state, 1, 1)
    engine.wait()
    assert engine.flusher_pid is not None
    os.kill(engine.flusher_pid, signal.SIGKILL)
    with caplog.at_level(logging.WARNING):
        for step in (2, 3):
            _steps(engine, state, step, step)
            engine.wait()
    # Killed while idle it costs nothing, or, where its death was not yet known, one save.
    assert state.reports[-1].error is None and "was killed by signal 9 (SIGKILL)" in caplog.text
    check_saved(tmp_path, 3)


@pytest.mark.parametrize("point", ["begin", "opened", "chunk", "before_fsync", "after_fsync", "before_manifest", "manifest_synced"])
@pytest.mark.parametrize("action", ["kill", "EIO"])
def test_a_flusher_that_dies_or_fails_at_any_point_costs_one_checkpoint(pool: RankPool, tmp_path: Path, point: str, action: str) -> None:
    results = pool.run(_failing_once, tmp_path, f"{point}={action}@2", ranks=2)
    words = {"kill": "killed by signal 9 (SIGKILL)", "EIO": "Input/output error"}[action]
    for errors in results:
        assert errors[-1] is None and 1 <= sum(error is not None for error in errors) <= 2, errors
        assert all(words in error and "(rank 1)" in error for error in errors if error is not None), errors


def _failing_once(folder: Path, fault: str) -> list[str | None]:
    state = State()
    engine = state.engine(folder, fault=fault if dist.get_rank() == 1 else "")
    for step in range(1, 5):
        _steps(engine, state, step, step)
        engine.wait()
    engine.close()
    check_saved(folder, 4)
    assert not list(folder.glob("*.tmp*"))
    return [report.error for report in state.reports]


def test_a_rank_that_does_not_vote_in_time_costs_one_checkpoint(pool: RankPool, tmp_path: Path) -> None:
    errors = pool.run(_late, tmp_path, ranks=2)
    assert errors == [["no vote of rank 1 within 0.20 s", None]] * 2


def _late(folder: Path) -> list[str | None]:
    """Rank 1 votes for the first save once that was given up, however long that takes."""
    state, first = State(), dist.get_rank() == 0
    engine = state.engine(folder, clock=lambda: 0.0, fault="" if first else f"before_vote=until:{folder / 'go'}")
    _steps(engine, state, 1, 1)
    if first:
        committer: Any = engine._committer
        committer.timeout_s = 0.2
        while not state.reports:
            engine._deliver(block=True)
        committer.timeout_s = engine.config.commit_timeout_s
        (folder / "go").touch()
    engine.wait()
    _steps(engine, state, 2, 2)
    engine.wait()
    engine.close()
    check_saved(folder, 2)
    return [report.error for report in state.reports]


@pytest.mark.parametrize("point", ["begin", "chunk", "before_fsync", "before_manifest"])
def test_storage_that_does_not_answer_is_given_up(tmp_path: Path, point: str) -> None:
    """After a time that passes for the first save only, once its flusher has come to the point and stopped there."""
    state = State()
    ahead_s = 0.0
    engine = state.engine(tmp_path, fault=f"{point}=stop", clock=lambda: time.monotonic() + ahead_s)
    _steps(engine, state, 1, 1)
    wait_until(lambda: engine.flusher_pid is not None and process_state(engine.flusher_pid).startswith("T"))
    ahead_s = engine.config.commit_timeout_s * 2
    engine.wait()
    _steps(engine, state, 2, 2)
    engine.wait()
    first, second = (report.error for report in state.reports)
    assert first is not None and "storage did not answer for 20 min" in first and second is None
    check_saved(tmp_path, 2)


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_failed_save_stops_all_ranks_at_the_same_update(pool: RankPool, tmp_path: Path, ranks: int) -> None:
    results = pool.run(_stopping, tmp_path, ranks=ranks)
    assert len(set(results)) == 1 and "Input/output error" in results[0]


def _stopping(folder: Path) -> str:
    state = State()
    last = not dist.is_initialized() or dist.get_rank() == dist.get_world_size() - 1
    engine = state.engine(folder, on_error=OnSaveError.STOP, fault="before_fsync=EIO" if last else "")
    _steps(engine, state, 1, 1)
    try:
        for step in itertools.count(2):  # noqa: B007 - reported below
            engine.wait_for_snapshot()
            time.sleep(0.01)
    except CheckpointError as error:
        return f"{step} {error}"
    finally:
        engine.close()


def test_the_interval_follows_what_was_measured(tmp_path: Path) -> None:
    state = State()
    engine = state.engine(tmp_path, interval=Interval.AUTO, every_steps=2, mean_time_to_failure_s=1e-3)
    saved: list[int] = []
    plans: list[Any] = []
    pacing: Any = engine._pacing
    made = pacing.saving
    pacing.saving = lambda *times: plans.append((times, made(*times))) or plans[-1][1]
    for step in itertools.count(1):
        engine.wait_for_snapshot()
        state.set(step)
        if engine.due(step):
            saved.append(step)
            engine.save(step, {})
            engine.wait()
        if len(saved) == 3:
            break
    # The first guess twice (nothing is known at the first save), then as often as storage takes them: whatever it was measured to take.
    (_, stall_s, durable_s, step_s), plan = plans[1]
    solved = solve_interval(stall_s=stall_s, durable_s=durable_s, step_s=step_s, mean_time_to_failure_s=1e-3)
    # A plan of as many steps as the first guess is no change, which nothing is said of.
    assert saved[:2] == [2, 4] and plan == (None if solved.steps == 2 else solved)
    assert saved[2] == 4 + solved.steps and durable_s == state.reports[0].save_s and step_s > 0
    engine.close()


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_trainer_that_dies_after_its_snapshot_loses_nothing(pool: RankPool, tmp_path: Path, ranks: int) -> None:
    """The flushers go on alone; the next start commits."""
    with pytest.raises(Exception, match="died"):
        pool.run(_die_after_snapshot, tmp_path, ranks=ranks)
    assert not files.scan(tmp_path)
    (tmp_path / "go").touch()
    pool.run(check_saved, tmp_path, 1, ranks=ranks)
    assert damage(tmp_path / "step-00000001") == []


def _die_after_snapshot(folder: Path) -> None:
    state = State()
    # Storage gets on once the trainer is gone.
    engine = state.engine(folder, fault=f"before_fsync=until:{folder / 'go'}")
    _steps(engine, state, 1, 1)
    attempt: Any = engine._latest
    attempt.copied.wait()
    # A flusher that has not come to its files yet is not seen by the next start, which waits for nobody else.
    own = f"*/__{dist.get_rank() if dist.is_initialized() else 0}_0.distcp"
    wait_until(lambda: any(files._is_locked(path) for path in folder.glob(own)))
    if dist.is_initialized():
        # The first death ends the other rank too.
        dist.barrier()
    os.kill(os.getpid(), signal.SIGKILL)


class Stage(torch.nn.Module):
    """Each rank holds a layer of its own, as stages of a pipeline do."""

    def __init__(self, layers: list[int], value: float) -> None:
        super().__init__()
        for layer in layers:
            self.register_parameter(f"layer{layer}", torch.nn.Parameter(torch.full((5, 3), value + layer)))


def _stage_engine(folder: Path, layers: list[int], value: float) -> tuple[Stage, CheckpointEngine]:
    stage = Stage(layers, value)
    optimizer = torch.optim.SGD(stage.parameters(), lr=0.1)
    return stage, CheckpointEngine(CheckpointConfig(name="test"), folder, state=Fsdp2State(stage, optimizer), metadata={})


def _save_stages(folder: Path) -> None:
    _, engine = _stage_engine(folder, [2 * dist.get_rank(), 2 * dist.get_rank() + 1], 10.0)
    engine.save(1, {})
    engine.wait()
    engine.close()


def _restore_stages(folder: Path, layers: list[list[int]]) -> list[float]:
    stage, engine = _stage_engine(folder, layers[dist.get_rank()], 0.0)
    assert engine.restore() is not None
    return [float(value[0, 0]) for value in stage.parameters()]


def test_weights_that_live_on_some_ranks_only_are_found_by_name_on_another_split(pool: RankPool, tmp_path: Path) -> None:
    pool.run(_save_stages, tmp_path, ranks=2)
    assert pool.run(_restore_stages, tmp_path, [[0, 1, 2], [3]], ranks=2) == [[10, 11, 12], [13]]
    assert pool.run(_restore_stages, tmp_path, [[0, 1, 2, 3]], ranks=1) == [[10, 11, 12, 13]]
    with pytest.raises(CheckpointError, match="layer3: 5x3 float32 in the checkpoint, not in the model"):
        pool.run(_restore_stages, tmp_path, [[0, 1], [2]], ranks=2)
