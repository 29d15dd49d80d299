"""Checkpoint directories as files: listed without torch, whole or damaged, kept or removed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from efflaunch.checkpoint import files
from efflaunch.checkpoint.catalog import Catalog
from efflaunch.checkpoint.manifest import FileRecord, Manifest, digest, manifest_name
from efflaunch.checkpoint.verify import damage
from efflaunch.tests.limits import ENDS_S


def _written(folder: Path, step: int, content: bytes = b"data", *, ranks: int = 2, attempt: str = "run-1") -> Path:
    """A directory in which `ranks` ranks have voted."""
    temporary = files.temporary_path(folder, step, attempt)
    temporary.mkdir(parents=True)
    for rank in range(ranks):
        written = {f"__{rank}_0.distcp": content} | ({"state.json": json.dumps({"step": step}).encode()} if rank == 0 else {})
        records = tuple(FileRecord(name, len(data), (digest(data),)) for name, data in written.items())
        for name, data in written.items():
            (temporary / name).write_bytes(data)
        manifest = Manifest(step, attempt, rank, 2, 1 << 20, records)
        (temporary / manifest_name(rank)).write_bytes(manifest.to_bytes())
    return temporary


def _commit(folder: Path, step: int, content: bytes = b"data") -> Path:
    files.commit(_written(folder, step, content))
    return files.step_path(folder, step)


def test_a_committed_directory_is_listed_with_its_sizes(tmp_path: Path) -> None:
    path = _commit(tmp_path / "checkpoints", 100)
    (info,) = files.list_checkpoints(tmp_path)
    assert (info.path, info.step, info.world_size, info.problem) == (path, 100, 2, None)
    assert info.num_bytes == sum(file.stat().st_size for file in path.iterdir() if file.name != "COMMIT") and info.time > 1e9
    assert damage(path) == []
    assert files.read_state(path) == {"step": 100}
    assert sorted(entry.name for entry in (tmp_path / "checkpoints").iterdir()) == ["step-00000100"]


def test_a_run_without_checkpoints_has_none(tmp_path: Path) -> None:
    assert files.list_checkpoints(tmp_path) == []
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "step-00000001.tmp-1").mkdir()
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
        ("COMMIT", b'{"format": 1, "files": {}, "time": 0, "world_size": 1}', "written in format 1, this version reads 2"),
        ("COMMIT", b'{"format": 2, "files": {}, "time": 0, "world_size": 1, "hash": "0"}', "its own hash does not match"),
        ("rank-1.json", None, "rank-1.json is missing"),
    ],
)
def test_damage_is_named(tmp_path: Path, name: str, content: bytes | None, problem: str) -> None:
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
    Catalog(tmp_path).prune(3, 2)
    assert [info.step for info in files.scan(tmp_path)] == [2, 3]
    Catalog(tmp_path).prune(3, 0)
    assert [info.step for info in files.scan(tmp_path)] == [3]
    (tmp_path / "step-00000003" / "__0_0.distcp").write_bytes(b"")
    Catalog(tmp_path).prune(3, 1)
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
        if ".tmp" in self.name:
            raise OSError(5, "Input/output error")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(OSError, match="Input/output"):
        _commit(tmp_path, 1, b"newer")
    assert (tmp_path / "step-00000001" / "__0_0.distcp").read_bytes() == b"old!"


def test_a_checkpoint_that_stood_aside_when_the_process_died_comes_back(tmp_path: Path) -> None:
    path = _commit(tmp_path, 1)
    path.rename(tmp_path / "step-00000001.old")
    (tmp_path / "step-00000001.tmp-1").mkdir()
    assert files.settle_leftovers(tmp_path, 0) == []
    assert [info.step for info in files.scan(tmp_path) if info.is_whole] == [1]
    assert [entry.name for entry in tmp_path.iterdir()] == ["step-00000001"]


def test_what_every_rank_had_voted_for_is_committed_at_the_next_start(tmp_path: Path) -> None:
    _written(tmp_path, 1)
    _written(tmp_path, 2, ranks=1)
    stale = _written(tmp_path, 3)
    other = _written(tmp_path, 3, attempt="run-2")
    (other / "rank-1.json").rename(stale / "rank-1.json")
    assert files.settle_leftovers(tmp_path, 0) == [1]
    assert [entry.name for entry in tmp_path.iterdir()] == ["step-00000001"] and damage(tmp_path / "step-00000001") == []


def test_half_a_commit_of_a_killed_rank_is_no_part_of_what_is_committed_later(tmp_path: Path) -> None:
    (_written(tmp_path, 1) / "COMMIT.part").write_text('{"half"')
    assert files.settle_leftovers(tmp_path, 0) == [1]
    assert [info.problem for info in files.scan(tmp_path)] == [None] and damage(tmp_path / "step-00000001") == []


def test_a_flusher_that_still_writes_is_waited_for(tmp_path: Path) -> None:
    temporary = _written(tmp_path, 1)
    vote = (temporary / "rank-1.json").read_bytes()
    (temporary / "rank-1.json").unlink()
    code = (
        "import fcntl, os, sys, time; d = os.open(sys.argv[1] + '/__1_0.distcp', os.O_WRONLY); fcntl.flock(d, fcntl.LOCK_EX)\n"
        "print(flush=True); time.sleep(0.5); open(sys.argv[1] + '/part', 'w').write(sys.argv[2])\n"
        "os.rename(sys.argv[1] + '/part', sys.argv[1] + '/rank-1.json')"
    )
    command = [sys.executable, "-c", code, str(temporary), vote.decode()]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as flusher:
        assert flusher.stdout is not None
        flusher.stdout.readline()
        assert files.settle_leftovers(tmp_path, ENDS_S) == [1]
    assert damage(tmp_path / "step-00000001") == []


@pytest.mark.parametrize("number", [0, 1])
def test_a_vote_for_something_else_is_no_vote(tmp_path: Path, number: int) -> None:
    temporary = _written(tmp_path, 1)
    votes = {rank: digest((temporary / manifest_name(rank)).read_bytes()) for rank in range(2)}
    with pytest.raises(ValueError, match=f"rank-{number}.json is not what rank {number} voted for"):
        files.commit(temporary, votes=votes | {number: "0"})
    files.commit(temporary, votes=votes)


def test_pinned_ones_and_multiples_stay(tmp_path: Path) -> None:
    for step in range(1, 8):
        _commit(tmp_path, step)
    (tmp_path / "step-00000001" / "PINNED").touch()
    assert Catalog(tmp_path).prune(7, 2, 3) == [2, 4, 5]
    assert [info.step for info in files.scan(tmp_path)] == [1, 3, 6, 7]


def test_swapped_files_of_ranks_are_found(tmp_path: Path) -> None:
    path = _commit(tmp_path, 1)
    temporary = _written(tmp_path, 2, b"dato")
    (temporary / "__1_0.distcp").rename(path / "__1_0.distcp")
    (info,) = files.scan(tmp_path)
    assert info.is_whole
    assert damage(path) == ["__1_0.distcp: bytes 0 to 4 are not what was written"]


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
