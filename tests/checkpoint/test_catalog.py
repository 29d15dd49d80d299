"""Retention between two saves: what it keeps is what a scan would keep, and a save costs the same however many there are."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from efflaunch.checkpoint import files
from efflaunch.checkpoint.catalog import Catalog
from efflaunch.checkpoint.manifest import Manifest, manifest_name


def commit(folder: Path, step: int) -> Path:
    temporary = files.temporary_path(folder, step, "a")
    temporary.mkdir(parents=True)
    manifest = Manifest(step=step, attempt="a", rank=0, world_size=1, chunk_bytes=1 << 20, files=())
    (temporary / manifest_name(0)).write_bytes(manifest.to_bytes())
    files.commit(temporary)
    return files.step_path(folder, step)


def steps(folder: Path) -> list[int]:
    return [info.step for info in files.scan(folder)]


@pytest.mark.parametrize("kept", [3, 40])
def test_what_a_save_reads_does_not_depend_on_how_many_are_kept(tmp_path: Path, kept: int) -> None:
    for step in range(1, kept + 1):
        commit(tmp_path, step)
    catalog = Catalog(tmp_path)
    catalog.prune(kept, kept)
    for step in range(kept + 1, kept + 6):
        commit(tmp_path, step)
        before = catalog.num_inspected
        assert catalog.prune(step, kept) == [step - kept]
        assert catalog.num_inspected - before == 2
    assert steps(tmp_path) == list(range(6, kept + 6))


def test_pins_of_others_and_multiples_stay(tmp_path: Path) -> None:
    catalog = Catalog(tmp_path)
    for step in range(1, 9):
        path = commit(tmp_path, step)
        if step == 2:
            (path / files.PINNED_FILE).touch()
        catalog.prune(step, 2, 3, in_use={files.step_path(tmp_path, 5)})
    assert steps(tmp_path) == [2, 3, 5, 6, 7, 8]
    (files.step_path(tmp_path, 2) / files.PINNED_FILE).unlink()
    commit(tmp_path, 9)
    assert catalog.prune(9, 2, 3) == [2, 5, 7]
    assert steps(tmp_path) == [3, 6, 8, 9]


def test_one_that_others_removed_is_no_error_and_one_they_damaged_does_not_count(tmp_path: Path) -> None:
    catalog = Catalog(tmp_path)
    for step in range(1, 5):
        commit(tmp_path, step)
        catalog.prune(step, 4)
    files.remove(files.step_path(tmp_path, 1))
    commit(tmp_path, 5)
    assert catalog.prune(5, 2) == [2, 3]
    (files.step_path(tmp_path, 5) / files.COMMIT_FILE).unlink()
    commit(tmp_path, 6)
    # 5 is damaged: 4 is kept in its place.
    assert catalog.prune(6, 2) == [5]
    assert steps(tmp_path) == [4, 6]


@pytest.mark.parametrize("name", ["../../etc/passwd", "/etc/passwd", "..", "", "a/b"])
def test_names_that_lead_out_of_a_checkpoint_are_damage(tmp_path: Path, name: str) -> None:
    record = {"name": name, "num_bytes": 1, "chunks": ["0"]}
    fields = {"step": 1, "attempt": "a", "rank": 0, "world_size": 1, "chunk_bytes": 1, "files": [record]}
    with pytest.raises(ValueError, match="is no name of a file in a checkpoint"):
        Manifest.from_bytes(json.dumps(fields).encode())
    path = commit(tmp_path, 1)
    record = json.loads((path / files.COMMIT_FILE).read_text())
    record.pop("hash")
    record["files"][name] = 1
    (path / files.COMMIT_FILE).write_text(json.dumps({**record, "hash": files._hash_of(record)}))
    (info,) = files.scan(tmp_path)
    assert info.problem is not None and "is no name of a file" in info.problem
