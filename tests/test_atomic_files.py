"""Files that are written whole or not at all, and disks that have no room for them."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from efflaunch.errors import EXIT_USER
from efflaunch.launcher import cli
from efflaunch.tests.no_room import no_room
from efflaunch.utils.atomic_files import FULL, FileError, file_errors_named, write_atomic


def test_old_content_stays_where_there_is_no_room(tmp_path: Path) -> None:
    path = tmp_path / "state.json"
    write_atomic(path, "old")
    with no_room(), pytest.raises(OSError, match="No space left") as raised:
        write_atomic(path, "new")
    assert raised.value.errno == errno.ENOSPC and raised.value.filename == str(path)
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("number", "expected"),
    [
        *((number, "room to write it") for number in FULL),
        *((number, "one that this user may use") for number in (errno.EACCES, errno.EPERM)),
        (errno.EROFS, "a file system that can be written"),
        *((number, "a path that can be used") for number in (errno.ENAMETOOLONG, errno.ELOOP, errno.ENOTDIR, errno.EISDIR)),
    ],
)
def test_what_the_user_can_mend_is_named(number: int, expected: str) -> None:
    with pytest.raises(FileError) as raised, file_errors_named():
        raise OSError(number, os.strerror(number), "/x/run.yaml")
    assert str(raised.value).startswith(f"/x/run.yaml: found {os.strerror(number)}; expected {expected}.\n  Try: ")
    assert raised.value.exit_code == EXIT_USER


def test_other_errors_are_passed_on() -> None:
    for number in (errno.EIO, errno.ENOENT, errno.EPIPE):
        with pytest.raises(OSError, match=os.strerror(number)) as raised, file_errors_named():
            raise OSError(number, os.strerror(number))
        assert not isinstance(raised.value, FileError)


LONG = f"/tmp/{'b' * 300}"
LOOP = "loop/x"
RUN = ("train", "+experiment=quickstart", "run.id=run")
BASE = ("model=tiny", "data=stdlib", "cluster=local_cpu")


@pytest.mark.parametrize("path", [LONG, LOOP], ids=["long", "loop"])
@pytest.mark.parametrize(
    "words",
    [
        (*RUN, "run.root=PATH"),
        (*RUN, "checkpoint.mirror=PATH"),
        (*RUN, "parallel.profile=PATH"),
        (*RUN, "--config-dir", "PATH"),
        ("train", *BASE, "model=pretrained", "model.path=PATH"),
        ("plan", "+experiment=quickstart", "--lengths", "PATH"),
        ("sweep", "+experiment=quickstart", "run.id=run", "run.root=PATH", "optim.lr=1e-3,1e-4"),
        *((command, "PATH") for command in ("status", "logs", "checkpoints", "explain", "cancel", "resume", "profile")),
        ("export", "PATH", "out"),
        ("data", "prepare", "PATH", "--out", "x", "--tokenizer", "y"),
        ("data", "prepare", "file", "--out", "PATH/x", "--tokenizer", "y"),
    ],
    ids=lambda words: next((f"{words[0]} {word}" for word in words if "PATH" in word), words[0]),
)
def test_paths_that_no_file_can_have(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], words: tuple[str, ...], path: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    (tmp_path / "loop").symlink_to("loop")
    monkeypatch.setattr("efflaunch.launcher.start.check_data", lambda config: None)
    assert cli.main([word.replace("PATH", path) for word in words]) == EXIT_USER
    told = capsys.readouterr()
    assert "unexpected" not in told.err and "found" in told.err
    assert sorted(os.listdir(tmp_path)) == ["file", "loop"]


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
