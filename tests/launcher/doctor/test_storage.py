"""Storage under a directory: its kind, room, locks, speed; nothing stays behind."""

from __future__ import annotations

import fcntl
from pathlib import Path

import pytest

from efflaunch.launcher.doctor import storage as looked
from efflaunch.launcher.doctor.finding import Finding, State
from efflaunch.launcher.doctor.storage import file_system, measure, storage


def by_name(directory: Path, num_bytes: int) -> dict[str, Finding]:
    return {each.name: each for each in storage(directory, num_bytes)}


def test_a_directory(tmp_path: Path) -> None:
    found = by_name(tmp_path, 3 << 20)
    assert list(found) == ["file system", "free space", "locks", "speed"]
    assert "(one file of 3.0 MiB)" in found["speed"].found and found["speed"].hint.startswith("cluster.storage_bandwidth=")
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_measured_with_zero(tmp_path: Path) -> None:
    assert "speed" not in by_name(tmp_path, 0)


def test_a_file_is_written_whole(tmp_path: Path) -> None:
    speed = measure(tmp_path / "probe", (1 << 20) + 1)
    assert (tmp_path / "probe").stat().st_size == 2 << 20
    assert speed.write > 0 and speed.read > 0


def test_a_directory_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **keys: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(looked.tempfile, "TemporaryDirectory", refuse)
    found = by_name(tmp_path, 1 << 20)
    assert found["writing"].state is State.BROKEN and found["writing"].found == f"Permission denied: {tmp_path}"


def test_a_file_system_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(file: object, how: int) -> None:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", refuse)
    assert by_name(tmp_path, 0)["locks"].state is State.WARNING


def test_little_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(looked, "LEAST_ROOM", 1 << 60)
    assert by_name(tmp_path, 0)["free space"].state is State.WARNING


def test_kinds() -> None:
    assert file_system(Path("/proc/self")) == "proc"
