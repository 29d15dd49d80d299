"""Saved on one layout, restored on another, with real ranks; and what happens when a save or a restore cannot work."""

from __future__ import annotations

import contextlib
import json
import os
import random
import resource
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from efflaunch.checkpoint import components as parts_module
from efflaunch.checkpoint import files
from efflaunch.checkpoint.config import CheckpointConfig, OnSaveError
from efflaunch.checkpoint.engine import CheckpointEngine, SaveReport
from efflaunch.checkpoint.restore import Restored
from efflaunch.errors import CheckpointError
from efflaunch.parallel.sharding.fsdp2 import Fsdp2State
from efflaunch.tests.ranks import RankPool
from efflaunch.tests.training.small import Small, backward, full, plain_model, shard
from efflaunch.training.optimizers.adamw import build_optimizer, clip_gradients
from efflaunch.training.optimizers.config import OptimConfig

CONFIG = CheckpointConfig(name="test")
SEGMENT_BYTES = 8192
"""Small, so that a small model wraps around its pool."""
METADATA = {"seed": 7, "config_hash": "abc", "layout": "test"}


@pytest.fixture(scope="module")
def pool() -> Iterator[RankPool]:
    with RankPool() as pool:
        yield pool


class Run:
    """A model, its optimizer and its engine on this rank; `seed` makes fresh weights that differ from the saved ones."""

    def __init__(
        self,
        folder: Path,
        *,
        replicate: int = 1,
        seed: int = 0,
        config: CheckpointConfig = CONFIG,
        model: Small | None = None,
        fault: str = "",
    ) -> None:
        plain = model or plain_model(seed=seed)
        self.model = shard(plain, replicate) if dist.is_initialized() else plain
        self.optimizer = build_optimizer(self.model, OptimConfig(name="test", lr=1e-2))
        self.reports: list[SaveReport] = []
        self.engine = CheckpointEngine(
            config,
            folder,
            state=Fsdp2State(self.model, self.optimizer),
            metadata=METADATA,
            on_save=self.reports.append,
            segment_bytes=SEGMENT_BYTES,
            fault=fault if (dist.is_initialized() and dist.get_rank() == dist.get_world_size() - 1) or not dist.is_initialized() else "",
        )

    def save(self, step: int, extra: dict[str, Any]) -> None:
        """Durable when it returns."""
        self.engine.save(step, extra)
        self.engine.wait()

    def train(self, first: int, last: int) -> None:
        for step in range(first, last):
            backward(self.model, step)
            clip_gradients(self.model, 1.0)
            self.engine.wait_for_snapshot()
            self.optimizer.step()
            self.optimizer.zero_grad()

    def tensors(self) -> dict[str, Tensor]:
        """Whole weights, buffers and optimizer states."""
        tensors = {name: full(value) for name, value in self.model.named_parameters()}
        tensors |= {name: value.clone() for name, value in self.model.named_buffers()}
        for name, parameter in self.model.named_parameters():
            tensors |= {f"{name}.{key}": full(value) for key, value in self.optimizer.state[parameter].items()}
        return tensors

    def local_random(self) -> list[float]:
        return [torch.rand(1).item(), float(np.random.rand()), random.random(), float(np.random.standard_normal())]


def _assert_equal(state: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert state.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(state[name], value), name


def _start(folder: Path, replicate: int) -> dict[str, Tensor]:
    run = Run(folder, replicate=replicate)
    run.train(0, 2)
    run.save(2, {"train": {"seed": 7, "step": 2}})
    return run.tensors()


def _go_on(folder: Path, replicate: int, step: int) -> tuple[Restored | None, dict[str, Tensor], dict[str, Tensor]]:
    """What a fresh run of this layout restores, and what it saves one update later."""
    run = Run(folder, replicate=replicate, seed=99)
    restored = run.engine.restore()
    loaded = run.tensors()
    run.train(step, step + 1)
    run.save(step + 1, {"train": {"seed": 7, "step": step + 1}})
    return restored, loaded, run.tensors()


def test_resume_on_4_then_2_1_4_and_3_ranks_finds_equal_weights_and_optimizer_states(pool: RankPool, tmp_path: Path) -> None:
    saved = pool.run(_start, tmp_path, 1, ranks=4)[0]
    for step, (ranks, replicate) in enumerate([(2, 1), (1, 1), (4, 2), (4, 1), (2, 2), (3, 1)], start=2):
        results = pool.run(_go_on, tmp_path, replicate, step, ranks=ranks)
        for restored, loaded, _ in results:
            assert restored.step == step and restored.extra == {"train": {"seed": 7, "step": step}}
            assert restored.metadata == METADATA and restored.skipped == ()
            assert restored.same_layout == (step in (5,))
            _assert_equal(loaded, saved)
        saved = results[0][2]
    assert [info.step for info in files.scan(tmp_path)] == [7, 8]


def _continue_or_not(folder: Path, stop_at: int | None) -> tuple[dict[str, Tensor], list[float]]:
    run = Run(folder)
    if stop_at is None:
        run.train(0, 4)
        return run.tensors(), run.local_random()
    run.train(0, stop_at)
    run.save(stop_at, {})
    resumed = Run(folder, seed=99)
    torch.rand(5)
    random.random()
    np.random.standard_normal()
    assert resumed.engine.restore() is not None
    resumed.train(stop_at, 4)
    return resumed.tensors(), resumed.local_random()


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_resumed_run_is_bit_equal_to_an_uninterrupted_one(pool: RankPool, tmp_path: Path, ranks: int) -> None:
    whole = pool.run(_seeded_by_rank, tmp_path / "a", None, ranks=ranks)
    resumed = pool.run(_seeded_by_rank, tmp_path / "b", 2, ranks=ranks)
    for (expected, expected_random), (state, own_random) in zip(whole, resumed, strict=True):
        _assert_equal(state, expected)
        assert own_random == expected_random
    assert len({tuple(values) for _, values in whole}) == ranks


def _seeded_by_rank(folder: Path, stop_at: int | None) -> tuple[dict[str, Tensor], list[float]]:
    # small.py seeds torch itself; each rank's generators must still be its own.
    random.seed(dist.get_rank())
    np.random.seed(dist.get_rank())
    np.random.standard_normal()
    return _continue_or_not(folder, stop_at)


def _random_after_restore(folder: Path) -> tuple[bool, list[float]]:
    run = Run(folder)
    restored = run.engine.restore()
    assert restored is not None
    return restored.same_layout, run.local_random()


def test_another_world_size_seeds_generators_from_seed_step_and_rank(pool: RankPool, tmp_path: Path) -> None:
    pool.run(_start, tmp_path, 1, ranks=1)
    first = pool.run(_random_after_restore, tmp_path, ranks=2)
    assert first == pool.run(_random_after_restore, tmp_path, ranks=2)
    assert first[0][1] != first[1][1] and not first[0][0]


def test_without_a_process_group(tmp_path: Path) -> None:
    run = Run(tmp_path)
    assert run.engine.restore() is None
    run.save(0, {"first": True})
    resumed = Run(tmp_path, seed=99)
    resumed.train(0, 1)
    restored = resumed.engine.restore()
    assert restored is not None and restored.extra == {"first": True} and restored.path == tmp_path / "step-00000000"
    _assert_equal(resumed.tensors(), run.tensors())
    assert not any(resumed.optimizer.state.values())
    run.train(0, 1)
    resumed.train(0, 1)
    _assert_equal(resumed.tensors(), run.tensors())


def test_a_tied_weight_is_stored_once_under_its_first_name(tmp_path: Path) -> None:
    Run(tmp_path).save(1, {})
    from torch.distributed.checkpoint import FileSystemReader

    keys = FileSystemReader(tmp_path / "step-00000001").read_metadata().state_dict_metadata
    assert "model.embed.weight" in keys and "model.head.weight" not in keys
    assert "model.layers.0.kept" in keys and "model.layers.0.table" not in keys


def test_a_forward_without_backward_before_the_save_changes_nothing(pool: RankPool, tmp_path: Path) -> None:
    assert pool.run(_save_after_forward, tmp_path, ranks=2) == [True, True]


def _save_after_forward(folder: Path) -> bool:
    run = Run(folder)
    run.train(0, 1)
    expected = run.tensors()
    with torch.no_grad():
        run.model(torch.zeros(1, 2, dtype=torch.int64))
    run.save(1, {})
    resumed = Run(folder, seed=99)
    resumed.engine.restore()
    _assert_equal(resumed.tensors(), expected)
    return True


def test_each_save_is_reported_and_only_the_last_are_kept(tmp_path: Path) -> None:
    run = Run(tmp_path, config=CheckpointConfig(name="test", keep_last=3))
    for step in range(5):
        run.save(step, {})
    assert [(report.step, report.error) for report in run.reports] == [(step, None) for step in range(5)]
    infos = files.scan(tmp_path)
    assert [info.step for info in infos] == [2, 3, 4] and all(info.is_whole and info.world_size == 1 for info in infos)
    assert run.reports[-1].num_bytes == infos[-1].num_bytes > 0 and run.reports[-1].path == infos[-1].path


def _damage(folder: Path, step: int) -> str:
    name = f"step-{step:08d}"
    victim = next((folder / name).glob("*.distcp"))
    os.truncate(victim, victim.stat().st_size - 1)
    return name


def _restore(folder: Path) -> Restored | None:
    return Run(folder, seed=5).engine.restore()


def test_a_damaged_checkpoint_is_passed_over_and_named(pool: RankPool, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run = Run(tmp_path)
    for step in (1, 2):
        run.save(step, {"step": step})
    name = _damage(tmp_path, 2)
    for restored in pool.run(_restore, tmp_path, ranks=2):
        assert restored.step == 1 and restored.extra == {"step": 1}
        assert len(restored.skipped) == 1 and name in restored.skipped[0] and "bytes instead of" in restored.skipped[0]
    _restore(tmp_path)
    assert "checkpoint skipped" in caplog.text and name in caplog.text
    run.save(2, {"step": "again"})
    resumed = _restore(tmp_path)
    assert resumed is not None and resumed.extra == {"step": "again"} and resumed.skipped == ()


def test_only_damaged_checkpoints_are_an_error_on_every_rank(pool: RankPool, tmp_path: Path) -> None:
    Run(tmp_path).save(1, {})
    _damage(tmp_path, 1)
    with pytest.raises(CheckpointError, match=r"(?s)only damaged checkpoints:.*step-00000001.*at least one whole"):
        pool.run(_restore, tmp_path, ranks=2)


@pytest.mark.parametrize("name", [".metadata", "index.json", "state.json", "rank-0.json", "__0_0.distcp", "COMMIT"])
def test_a_changed_byte_anywhere_is_named_and_the_one_before_is_restored(tmp_path: Path, name: str) -> None:
    run = Run(tmp_path)
    for step in (1, 2):
        run.save(step, {"step": step})
    victim = tmp_path / "step-00000002" / name
    data = bytearray(victim.read_bytes())
    data[len(data) // 2] ^= 0x10
    victim.write_bytes(data)
    restored = _restore(tmp_path)
    assert restored is not None and restored.step == 1
    assert "step-00000002" in restored.skipped[0] and name in restored.skipped[0], restored.skipped
    # It stays passed over, and retention does not count it.
    (info,) = [info for info in files.scan(tmp_path) if info.step == 2]
    assert not info.is_whole


def _restore_wider(folder: Path) -> None:
    torch.manual_seed(0)
    Run(folder, model=Small(8, num_layers=3, tied=False)).engine.restore()


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_checkpoint_of_another_model_names_the_first_differences(pool: RankPool, tmp_path: Path, ranks: int) -> None:
    Run(tmp_path).save(1, {})
    message = (
        r"(?s)another model's weights:\n    embed.weight: 11x7 float32 in the checkpoint, 11x8 float32 in the model.*and \d+ more.*run.id="
    )
    with pytest.raises(CheckpointError, match=message):
        pool.run(_restore_wider, tmp_path, ranks=ranks)


def test_a_checkpoint_of_another_depth_or_dtype_is_another_model(tmp_path: Path) -> None:
    Run(tmp_path).save(1, {})
    with pytest.raises(CheckpointError, match=r"layers.1.gate: 2 float32 in the checkpoint, not in the model"):
        Run(tmp_path, model=Small(num_layers=1)).engine.restore()
    with pytest.raises(CheckpointError, match=r"layers.2.gate: not in the checkpoint, 2 float32 in the model"):
        Run(tmp_path, model=Small(num_layers=3)).engine.restore()
    with pytest.raises(CheckpointError, match=r"embed.weight: 11x7 float32 in the checkpoint, 11x7 float64 in the model"):
        Run(tmp_path, model=Small().double()).engine.restore()


@contextlib.contextmanager
def _file_size_limit(pid: int | None, num_bytes: int) -> Iterator[None]:
    """On the process that writes."""
    assert pid is not None
    before = resource.prlimit(pid, resource.RLIMIT_FSIZE)
    resource.prlimit(pid, resource.RLIMIT_FSIZE, (num_bytes, before[1]))
    try:
        yield
    finally:
        resource.prlimit(pid, resource.RLIMIT_FSIZE, before)


def _fail_on_the_last_rank(folder: Path, on_error: OnSaveError) -> tuple[list[str | None], list[int], list[str], bool]:
    """Save, save with one rank out of space, save again."""
    run = Run(folder, config=CheckpointConfig(name="test", on_error=on_error))
    run.train(0, 1)
    run.save(1, {"good": True})
    kept = run.tensors()
    run.train(1, 2)
    last = dist.get_rank() == dist.get_world_size() - 1
    with _file_size_limit(run.engine.flusher_pid, 2000) if last else contextlib.nullcontext():
        run.save(2, {})
    left = sorted(path.name for path in folder.iterdir())
    dist.barrier()
    resumed = Run(folder, seed=99)
    restored = resumed.engine.restore()
    _assert_equal(resumed.tensors(), kept)
    run.save(3, {})
    return [report.error for report in run.reports], [restored.step if restored else -1], left, True


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_full_disk_on_one_rank_leaves_the_previous_checkpoint_and_training_continues(pool: RankPool, tmp_path: Path, ranks: int) -> None:
    for errors, restored, left, _ in pool.run(_fail_on_the_last_rank, tmp_path, OnSaveError.CONTINUE, ranks=ranks):
        assert errors[0] is None and errors[2] is None
        assert errors[1] is not None and "File too large" in errors[1] and (ranks == 1 or "(rank 1)" in errors[1])
        assert restored == [1] and left == ["step-00000001"]
    assert [info.step for info in files.scan(tmp_path)] == [1, 3]


def test_a_full_disk_stops_training_on_every_rank_where_configured(pool: RankPool, tmp_path: Path) -> None:
    results = pool.run(_stopped, tmp_path, ranks=2)
    assert results[0] == results[1]
    assert "checkpoint of step 2: found [Errno 27] File too large" in results[0] and "checkpoint.on_error=continue" in results[0]
    assert [info.step for info in files.scan(tmp_path)] == [1] and [path.name for path in tmp_path.iterdir()] == ["step-00000001"]


def _stopped(folder: Path) -> str:
    try:
        _fail_on_the_last_rank(folder, OnSaveError.STOP)
    except CheckpointError as error:
        dist.barrier()
        return str(error)
    return "was not stopped"


@contextlib.contextmanager
def _mounted(folder: Path, options: str) -> Iterator[None]:
    folder.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)], capture_output=True, check=False)
    if done.returncode:
        pytest.skip("mounting needs root")
    try:
        yield
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def test_a_file_system_without_room_is_noticed_before_anything_is_written(tmp_path: Path) -> None:
    with _mounted(tmp_path / "disk", "size=400k"):
        run = Run(tmp_path / "disk", config=CheckpointConfig(name="test", keep_last=9))
        run.train(0, 1)
        for step in range(1, 6):
            run.save(step, {})
        errors = [report.error for report in run.reports]
        num_good = errors.index(next(filter(None, errors)))
        assert num_good >= 1 and all("No space left on device" in (error or "") for error in errors[num_good:])
        assert [info.step for info in files.scan(tmp_path / "disk") if info.is_whole] == list(range(1, num_good + 1))
        assert not list((tmp_path / "disk").glob("*.tmp*"))


@pytest.mark.parametrize("point", ["opened", "chunk", "before_fsync", "before_manifest"])
def test_a_disk_that_fails_while_writing(tmp_path: Path, point: str) -> None:
    run = Run(tmp_path, fault=f"{point}=ENOSPC@2")
    run.train(0, 1)
    for step in range(1, 5):
        run.save(step, {})
    errors = [report.error for report in run.reports]
    assert sum(error is not None for error in errors) == 1
    assert all("No space left on device" in error for error in errors if error is not None)
    assert errors[-1] is None
    assert all(info.is_whole for info in files.scan(tmp_path)) and not list(tmp_path.glob("*.tmp*"))


def test_a_folder_that_cannot_be_written_is_refused_at_the_start(pool: RankPool, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(CheckpointError, match=r"(?s)found \[Errno 20\] Not a directory.*run.root="):
        Run(tmp_path / "file" / "checkpoints")
    with pytest.raises(CheckpointError, match="Not a directory"):
        pool.run(_restore, tmp_path / "file" / "checkpoints", ranks=2)


def test_a_read_only_mount_is_refused_at_the_start(tmp_path: Path) -> None:
    with _mounted(tmp_path / "disk", "ro"), pytest.raises(CheckpointError, match="Read-only file system"):
        Run(tmp_path / "disk" / "checkpoints")


def _own_disk_per_node(folder: Path) -> None:
    parts_module.SEEN_S = 0.2  # type: ignore[attr-defined]
    Run(folder if dist.get_rank() == 0 else folder / "elsewhere")


def test_a_folder_other_nodes_do_not_see_is_refused_at_the_start(pool: RankPool, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"(?s)no directory .*elsewhere on every node \(rank 1\).*shared storage"):
        pool.run(_own_disk_per_node, tmp_path, ranks=2)


def test_leftovers_of_a_killed_save_are_removed_at_the_next_start(tmp_path: Path) -> None:
    Run(tmp_path).save(1, {})
    for name in ("step-00000002.tmp-1", "step-00000000.trash"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__0_0.distcp").write_bytes(b"half")
    assert _restore(tmp_path).step == 1  # type: ignore[union-attr]
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_plain_torch_reads_the_files(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.train(0, 1)
    run.save(1, {})
    import torch.distributed.checkpoint as dcp

    target: dict[str, Any] = {"model.embed.weight": torch.zeros(11, 7)}
    dcp.load(target, checkpoint_id=str(tmp_path / "step-00000001"), no_dist=True)
    assert torch.equal(target["model.embed.weight"], run.model.embed.weight)
    state = json.loads((tmp_path / "step-00000001" / "state.json").read_text())
    assert state["metadata"] == METADATA and state["step"] == 1 and {"torch", "efflaunch"} <= set(state["versions"])
