"""A second place for checkpoints: a directory or an object store, with its own commit record; restored from when needed."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest
import torch.distributed as dist

from efflaunch.bench.chaos import State
from efflaunch.checkpoint import files
from efflaunch.checkpoint.tier import Tier
from efflaunch.errors import CheckpointError
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


def test_a_place_that_fails_is_told_and_training_goes_on(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("in the way")
    _save(tmp_path / "here", str(tmp_path / "file" / "there"), 1)
    assert "checkpoint of step 1 is not at" in caplog.text
    assert [info.problem for info in files.scan(tmp_path / "here")] == [None]


def test_an_address_nobody_can_open_is_an_error_at_the_start(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"checkpoint.mirror: found nosuch://bucket .*expected a directory or an fsspec address"):
        State().engine(tmp_path, mirror="nosuch://bucket")
