"""Checkpoint directories as files: listed without torch, whole or damaged, kept or removed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from efflaunch.checkpoint import files


def _commit(folder: Path, step: int, content: bytes = b"data") -> Path:
    temporary = files.temporary_path(folder, step)
    temporary.mkdir(parents=True)
    (temporary / "__0_0.distcp").write_bytes(content)
    files.commit(folder, step, state={"step": step}, world_size=2)
    return files.step_path(folder, step)


def test_a_committed_directory_is_listed_with_its_sizes(tmp_path: Path) -> None:
    path = _commit(tmp_path / "checkpoints", 100)
    (info,) = files.list_checkpoints(tmp_path)
    assert (info.path, info.step, info.world_size, info.problem) == (path, 100, 2, None)
    assert info.num_bytes == 4 + (path / "state.json").stat().st_size and info.time > 1e9
    assert files.read_state(path) == {"step": 100}
    assert sorted(entry.name for entry in (tmp_path / "checkpoints").iterdir()) == ["step-00000100"]


def test_a_run_without_checkpoints_has_none(tmp_path: Path) -> None:
    assert files.list_checkpoints(tmp_path) == []
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "step-00000001.tmp").mkdir()
    (tmp_path / "checkpoints" / "notes.txt").write_text("mine")
    assert files.list_checkpoints(tmp_path) == []


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("__0_0.distcp", b"dat", "__0_0.distcp has 3 bytes instead of 4"),
        ("__0_0.distcp", None, "__0_0.distcp is missing"),
        ("COMMIT", None, "COMMIT cannot be read"),
        ("COMMIT", b'{"format": 1, "st', "COMMIT cannot be read"),
        ("COMMIT", b"[]", "COMMIT cannot be read"),
        ("COMMIT", b"", "COMMIT cannot be read"),
        ("COMMIT", b'{"format": 2, "files": {}, "time": 0, "world_size": 1}', "written in format 2, this version reads 1"),
    ],
)
def test_damage_is_told(tmp_path: Path, name: str, content: bytes | None, problem: str) -> None:
    path = _commit(tmp_path, 1)
    (path / name).unlink()
    if content is not None:
        (path / name).write_bytes(content)
    (info,) = files.scan(tmp_path)
    assert info.problem is not None and problem in info.problem and not info.is_whole


def test_pruning_keeps_the_newest_whole_ones_and_never_none(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4):
        _commit(tmp_path, step)
    (tmp_path / "step-00000004" / "__0_0.distcp").write_bytes(b"")
    files.prune(tmp_path, 2)
    assert [info.step for info in files.scan(tmp_path)] == [2, 3]
    files.prune(tmp_path, 0)
    assert [info.step for info in files.scan(tmp_path)] == [3]
    (tmp_path / "step-00000003" / "__0_0.distcp").write_bytes(b"")
    files.prune(tmp_path, 1)
    assert [info.step for info in files.scan(tmp_path)] == [3]


def test_the_same_step_again_replaces_the_old_one(tmp_path: Path) -> None:
    _commit(tmp_path, 1, b"old!")
    path = _commit(tmp_path, 1, b"newer")
    assert (path / "__0_0.distcp").read_bytes() == b"newer"
    assert [entry.name for entry in tmp_path.iterdir()] == ["step-00000001"]


def test_a_failed_commit_brings_the_old_one_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _commit(tmp_path, 1, b"old!")
    rename = Path.rename

    def refuse(self: Path, target: Path) -> Path:
        if self.name.endswith(".tmp"):
            raise OSError(5, "Input/output error")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(OSError, match="Input/output"):
        _commit(tmp_path, 1, b"newer")
    assert (tmp_path / "step-00000001" / "__0_0.distcp").read_bytes() == b"old!"


def test_a_checkpoint_that_stood_aside_when_the_process_died_comes_back(tmp_path: Path) -> None:
    path = _commit(tmp_path, 1)
    path.rename(tmp_path / "step-00000001.old")
    (tmp_path / "step-00000001.tmp").mkdir()
    files.remove_leftovers(tmp_path)
    assert [info.step for info in files.scan(tmp_path) if info.is_whole] == [1]
    assert [entry.name for entry in tmp_path.iterdir()] == ["step-00000001"]


def test_writability_is_proven_by_writing(tmp_path: Path) -> None:
    files.check_writable(tmp_path / "a" / "b")
    assert list((tmp_path / "a" / "b").iterdir()) == []
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="Not a directory"):
        files.check_writable(tmp_path / "file" / "b")


def test_listing_does_not_import_torch(tmp_path: Path) -> None:
    _commit(tmp_path / "checkpoints", 3)
    code = (
        "import sys, json; from pathlib import Path; from efflaunch.checkpoint.files import list_checkpoints\n"
        "infos = list_checkpoints(Path(sys.argv[1])); print(json.dumps([infos[0].step, 'torch' in sys.modules, 'numpy' in sys.modules]))"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == [3, False, False]
