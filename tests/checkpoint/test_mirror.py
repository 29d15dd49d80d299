"""A second place for checkpoints: a directory or an object store, with its own commit record; restored from when needed."""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest
import torch.distributed as dist

from efflaunch.bench.chaos import State
from efflaunch.checkpoint import files
from efflaunch.checkpoint import tier as tier_module
from efflaunch.checkpoint.config import CheckpointConfig, OnSaveError, check_checkpoint
from efflaunch.checkpoint.mirror import MirrorReport
from efflaunch.checkpoint.tier import Tier, check_place, reach
from efflaunch.errors import CheckpointError, ConfigError
from efflaunch.tests.limits import ENDS_S
from efflaunch.tests.ranks import RankPool


@pytest.fixture(scope="module")
def pool() -> Iterator[RankPool]:
    with RankPool() as pool:
        yield pool


@pytest.fixture
def memory() -> Iterator[str]:
    yield "memory://checkpoints/run"
    fsspec.filesystem("memory").rm("/checkpoints", recursive=True)


def _save(folder: Path, address: str, steps: int) -> None:
    state = State()
    engine = state.engine(folder, mirror=address, mirror_keep_last=2)
    for step in range(1, steps + 1):
        state.set(step)
        engine.save(step, {"step": step})
        engine.wait(mirrored=True)
    if dist.is_initialized():
        dist.barrier()
    engine.close()


def _restore(folder: Path, address: str) -> tuple[int, tuple[str, ...], str]:
    state = State()
    engine = state.engine(folder, mirror=address)
    restored = engine.restore()
    assert restored is not None and restored.extra == {"step": restored.step}
    engine.close()
    return restored.step, restored.skipped, state.wrong(restored.step)


def test_an_object_store_gets_a_copy_that_counts_once_its_commit_is_there(tmp_path: Path, memory: str) -> None:
    _save(tmp_path / "here", memory, 3)
    tier = Tier(memory)
    assert tier.steps() == [2, 3] and tier.damage(3) == []
    fsspec.filesystem("memory").rm_file("/checkpoints/run/step-00000003/COMMIT")
    assert tier.steps() == [2]


@pytest.mark.parametrize("ranks", [1, 2])
def test_what_is_gone_or_damaged_here_is_fetched_from_there(pool: RankPool, tmp_path: Path, ranks: int) -> None:
    here, there = tmp_path / "here", str(tmp_path / "there")
    pool.run(_save, here, there, 2, ranks=ranks)
    victim = here / "step-00000002" / "__0_0.distcp"
    data = bytearray(victim.read_bytes())
    data[len(data) // 2] ^= 1
    victim.write_bytes(data)
    for step, skipped, wrong in pool.run(_restore, here, there, ranks=ranks):
        assert (step, wrong) == (2, "") and "__0_0.distcp" in skipped[0]
    shutil.rmtree(here)
    # On another number of ranks too.
    assert pool.run(_restore, here, there, ranks=3 - ranks) == [(2, (), "")] * (3 - ranks)
    assert [info.problem for info in files.scan(here)] == [None]


def test_damage_there_is_found_while_fetching(tmp_path: Path, memory: str) -> None:
    _save(tmp_path / "here", memory, 2)
    shutil.rmtree(tmp_path / "here")
    store = fsspec.filesystem("memory")
    path = "/checkpoints/run/step-00000002/__0_0.distcp"
    data = bytearray(store.cat_file(path))
    data[100] ^= 1
    store.pipe_file(path, bytes(data))
    step, skipped, wrong = _restore(tmp_path / "here", memory)
    assert (step, wrong) == (1, "") and "step 2 at memory://" in skipped[0] and "not what was written" in skipped[0]
    assert "__0_0.distcp" in Tier(memory).damage(2)[0]


def test_an_address_nobody_can_open_is_an_error_at_the_start(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"checkpoint.mirror: found nosuch://bucket .*expected a directory or an fsspec address"):
        State().engine(tmp_path, mirror="nosuch://bucket")


@pytest.mark.parametrize("mirror", ["", " ", ".", "./", "s3://", "file:///", "://x", "a\nb", "memory://run"])
def test_a_place_that_is_none_is_refused(mirror: str) -> None:
    """An empty path is the current directory to fsspec: checkpoints would be written there, and others' removed."""
    with pytest.raises(ConfigError, match=r"checkpoint\.mirror: found"):
        check_checkpoint(CheckpointConfig(name="c", mirror=mirror))


def test_a_place_that_holds_other_things_or_keeps_nothing_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = tmp_path / "runs" / "run" / "checkpoints"
    monkeypatch.chdir(tmp_path)
    (tmp_path / "step-00000001").mkdir()
    for place in (tmp_path, own, own / "inside", tmp_path / "runs" / "run"):
        with pytest.raises(CheckpointError, match="expected a folder of its own for this run"):
            reach(str(place), own)
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(CheckpointError, match="expected a place that can be reached and written"):
        reach(str(tmp_path / "file" / "there"), own)
    assert reach(str(tmp_path / "there"), own).steps() == [] and [path.name for path in (tmp_path / "there").iterdir()] == ["RUN"]
    reach(str(tmp_path / "there"), own)
    with pytest.raises(CheckpointError, match="it belongs to the run 'run', by the file RUN there"):
        reach(str(tmp_path / "there"), tmp_path / "runs" / "other" / "checkpoints")
    assert (tmp_path / "step-00000001").is_dir()


def test_the_checkpoints_of_another_run_are_no_second_place(tmp_path: Path) -> None:
    """They would be pruned as this run's own. A folder of something else is none either, and nothing is left there."""
    own, other = tmp_path / "runs" / "run" / "checkpoints", tmp_path / "runs" / "other"
    (other / "checkpoints" / "step-00000001").mkdir(parents=True)
    (other / "run.yaml").touch()
    (tmp_path / "link").symlink_to(other / "checkpoints")
    for place in (other, other / "checkpoints", other / "checkpoints" / "step-00000001", tmp_path / "link", f"file://{other}/deep/er"):
        for check in (reach, check_place):
            with pytest.raises(CheckpointError, match=f"in the run directory {other}"):
                check(str(place), own)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").touch()
    with pytest.raises(CheckpointError, match="it holds 'config.json', which is no checkpoint"):
        reach(str(tmp_path / "model"), own)
    assert [path.name for path in (tmp_path / "model").iterdir()] == ["config.json"]
    assert [path.name for path in (other / "checkpoints").iterdir()] == ["step-00000001"]


def test_a_place_is_looked_at_without_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As is done where a job is submitted: the machines it runs on are others."""
    own = tmp_path / "runs" / "run" / "checkpoints"
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match=f"{tmp_path}/file, which is no directory"):
        check_place(str(tmp_path / "file" / "there"), own)
    with pytest.raises(CheckpointError, match="which holds other things"):
        check_place(str(own), own)
    (tmp_path / "there").mkdir()
    assert check_place(str(tmp_path / "there"), own).local_path == tmp_path / "there" and not list((tmp_path / "there").iterdir())
    check_place("/nowhere/on/this/machine", own)
    assert not Path("/nowhere").exists()
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(CheckpointError, match=f"{tmp_path}/there, which cannot be written"):
        check_place(str(tmp_path / "there"), own)


class _Slow(Tier):
    def trouble(self, run: str) -> str | None:
        threading.Event().wait()
        return None


def test_a_place_that_does_not_answer_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tier_module, "REACH_S", 0.01)
    monkeypatch.setattr(tier_module, "Tier", _Slow)
    with pytest.raises(CheckpointError, match="no answer within 0 s"):
        reach(str(tmp_path / "there"), tmp_path / "own")


def _save_where_it_fails(folder: Path, there: Path, policy: OnSaveError) -> tuple[list[MirrorReport], str]:
    """Three saves; the second place is lost after the first. With `stop` nobody waits for the second, as in training."""
    state, reports, error = State(), list[MirrorReport](), ""
    engine = state.engine(folder, mirror=str(there), mirror_on_error=policy)
    engine._on_mirror = reports.append
    first = not dist.is_initialized() or dist.get_rank() == 0
    for step in (1, 2, 3):
        state.set(step)
        try:
            engine.save(step, {})
            if step != 2 or policy is OnSaveError.CONTINUE:
                engine.wait(mirrored=True)
            elif first:
                engine._mirror.wait(ENDS_S)
        except CheckpointError as failure:
            error = str(failure)
            break
        if step == 1 and first:
            shutil.rmtree(there)
            there.write_text("in the way")
    if dist.is_initialized():
        dist.barrier()
    engine.close()
    return reports, error


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_place_that_is_lost_is_a_failure_by_policy(pool: RankPool, tmp_path: Path, ranks: int) -> None:
    results = pool.run(_save_where_it_fails, tmp_path / "a", tmp_path / "there-a", OnSaveError.CONTINUE, ranks=ranks)
    assert all(error == "" for _, error in results)
    reports = results[0][0]
    assert [report.step for report in reports] == [1, 2, 3] and [report.error is None for report in reports] == [True, False, False]
    results = pool.run(_save_where_it_fails, tmp_path / "b", tmp_path / "there-b", OnSaveError.STOP, ranks=ranks)
    assert all("checkpoint of step 2 at" in error and "mirror_on_error=stop asks" in error for _, error in results)
    # What was reached is saved before training stops.
    assert [info.step for info in files.scan(tmp_path / "b")] == [2, 3]
