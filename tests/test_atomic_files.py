"""Files that are written whole or not at all, and disks that have no room for them."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from efflaunch.errors import EXIT_USER
from efflaunch.launcher import cli
from efflaunch.tests.no_room import no_room
from efflaunch.utils.atomic_files import FULL, FullDiskError, full_disk_named, write_atomic


def test_old_content_stays_where_there_is_no_room(tmp_path: Path) -> None:
    path = tmp_path / "state.json"
    write_atomic(path, "old")
    with no_room(), pytest.raises(OSError, match="No space left") as raised:
        write_atomic(path, "new")
    assert raised.value.errno == errno.ENOSPC and raised.value.filename == str(path)
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("number", FULL)
def test_a_full_disk_is_named(number: int) -> None:
    with pytest.raises(FullDiskError, match=r"/x/run\.yaml: found .*; expected room to write it") as raised, full_disk_named():
        raise OSError(number, os.strerror(number), "/x/run.yaml")
    assert raised.value.exit_code == EXIT_USER
    with pytest.raises(PermissionError), full_disk_named():
        raise PermissionError(errno.EACCES, "no")


def test_a_run_that_finds_no_room_says_so_and_starts_once_there_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """run.yaml, its hash and state.json are the first files of a run."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("efflaunch.launcher.start.check_data", lambda config: None)
    monkeypatch.setattr("efflaunch.launcher.local.run", lambda *given, **named: 0)
    words = ["train", "+experiment=quickstart", "run.id=run"]
    for name in ("1.yaml", "run.yaml", "run.sha256"):
        with no_room(name):
            assert cli.main(words) == EXIT_USER
        told = capsys.readouterr().err
        assert f"{name}: found No space left on device; expected room to write it" in told and "unexpected" not in told
    assert cli.main(words) == 0
