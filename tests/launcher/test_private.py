"""Who may read a run directory."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from efflaunch.errors import ConfigError
from efflaunch.launcher.rundir.run_dir import make_run_dir


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.fixture(autouse=True)
def _usual_umask() -> None:
    os.umask(0o022)


def test_private_but_not_what_is_above(tmp_path: Path) -> None:
    make_run_dir(tmp_path / "runs" / "one")
    (tmp_path / "runs" / "one" / "file").write_text("x")
    assert mode(tmp_path / "runs") == 0o755 and mode(tmp_path / "runs" / "one") == 0o700
    assert mode(tmp_path / "runs" / "one" / "logs") == 0o700 and mode(tmp_path / "runs" / "one" / "file") == 0o600


def test_shared_goes_by_the_umask(tmp_path: Path) -> None:
    os.umask(0o027)
    make_run_dir(tmp_path / "one", private=False)
    (tmp_path / "one" / "file").write_text("x")
    assert (mode(tmp_path / "one"), mode(tmp_path / "one" / "file")) == (0o750, 0o640)


def test_an_open_one_is_closed_and_keeps_its_group_bit(tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    (tmp_path / "one").chmod(0o2775)
    make_run_dir(tmp_path / "one")
    assert mode(tmp_path / "one") == 0o2700


def test_a_private_one_is_opened(tmp_path: Path) -> None:
    make_run_dir(tmp_path / "one")
    for name in ("run.yaml", "program"):
        (tmp_path / "one" / name).touch()
    (tmp_path / "one" / "program").chmod(0o700)
    (tmp_path / "one" / "link").symlink_to("/etc/hostname")
    os.umask(0o027)
    make_run_dir(tmp_path / "one", private=False)
    assert mode(tmp_path / "one") == mode(tmp_path / "one" / "logs") == mode(tmp_path / "one" / "program") == 0o750


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
def test_another_users_directory_is_not_closed(tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    os.chown(tmp_path / "one", 65534, 65534)
    with pytest.raises(ConfigError, match=r"belongs to another user.*\n.*run.private=false"):
        make_run_dir(tmp_path / "one")
    make_run_dir(tmp_path / "one", private=False)
