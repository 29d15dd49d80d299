"""One efflaunch per run directory: among processes of one machine, and of several that share its file system."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import socket
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from efflaunch.errors import ConfigError
from efflaunch.launcher.rundir import lock
from efflaunch.launcher.rundir.lock import STALE_S, Owner, Presence, holding, is_held, is_locked, lock_run, release, this_machine_id
from efflaunch.tests.launcher.runs import environment
from efflaunch.tests.limits import ENDS_S

THERE = Owner(host="n7", pid=4711, machine="another kernel", since=time.time() - 7500, key="theirs")


def write(run_dir: Path, owner: Owner, heard_s_ago: float = 0.0) -> None:
    """As another machine's file client leaves it; its kernel's lock is not seen here."""
    (run_dir / ".lock").write_text(json.dumps(asdict(owner)))
    at = time.time() - heard_s_ago
    os.utime(run_dir / ".lock", (at, at))


@pytest.mark.parametrize(
    ("owner", "age_s", "trusted", "held"),
    [
        (None, 0.0, True, False),
        (None, 0.0, False, False),
        (THERE, 1.0, True, True),
        (THERE, 1.0, False, True),
        (THERE, STALE_S + 1, True, False),
        (replace(THERE, machine="here"), 1.0, True, False),
        (replace(THERE, machine="here"), 1.0, False, True),
        (replace(THERE, machine="here"), STALE_S + 1, False, False),
    ],
)
def test_who_is_believed(owner: Owner | None, age_s: float, trusted: bool, held: bool) -> None:
    assert is_held(owner, age_s, machine="here", trusted=trusted) is held


def test_the_error_names_the_holder_and_since_when(tmp_path: Path) -> None:
    """By a process of its own, as flock counts by open files."""
    with holding(tmp_path):
        code = "import sys; from pathlib import Path; from efflaunch.launcher.rundir.lock import lock_run; lock_run(Path(sys.argv[1]))"
        command = [sys.executable, "-c", code, str(tmp_path)]
        done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=ENDS_S)
        assert is_locked(tmp_path)
    who = f"found process {os.getpid()} on {re.escape(socket.gethostname())}"
    pattern = rf"{who}, there since \d{{4}}-\d\d-\d\d \d\d:\d\d:\d\d \(.+\), heard of .+ s ago"
    assert done.returncode == 1 and re.search(pattern, done.stderr), done.stderr
    assert not is_locked(tmp_path)
    release(lock_run(tmp_path))


def test_a_holder_on_another_node_that_locks_do_not_reach(tmp_path: Path) -> None:
    write(tmp_path, THERE, heard_s_ago=15)
    assert is_locked(tmp_path)
    with pytest.raises(
        ConfigError, match=r"process 4711 on n7, there since .* \(2 h \d+ min\), heard of \d+ s ago, running in it"
    ) as caught:
        lock_run(tmp_path)
    assert f"efflaunch cancel {tmp_path} on n7" in str(caught.value) and "if n7 is down: in " in str(caught.value)
    assert json.loads((tmp_path / ".lock").read_text())["key"] == "theirs"


def test_a_dead_node_is_waited_for_and_then_forgotten(tmp_path: Path) -> None:
    write(tmp_path, THERE, heard_s_ago=STALE_S + 5)
    assert not is_locked(tmp_path)
    mine = lock_run(tmp_path)
    owner = Owner(**json.loads((tmp_path / ".lock").read_text()))
    assert (owner.pid, owner.machine) == (os.getpid(), this_machine_id())
    release(mine)


def test_given_back_is_free_on_every_node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    release(lock_run(tmp_path))
    monkeypatch.setattr(lock, "this_machine_id", lambda: "another kernel")
    assert not is_locked(tmp_path)
    release(lock_run(tmp_path))


def test_a_killed_holder_of_this_machine_leaves_nothing(tmp_path: Path) -> None:
    code = (
        "import os, signal, sys; from pathlib import Path; from efflaunch.launcher.rundir.lock import lock_run;"
        "lock_run(Path(sys.argv[1])); os.kill(os.getpid(), signal.SIGKILL)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], env=environment(), timeout=ENDS_S)
    assert done.returncode == -9 and (tmp_path / ".lock").stat().st_size
    assert not is_locked(tmp_path)
    release(lock_run(tmp_path))


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_file_system_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    def none(file: int, operation: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", none)
    mine = lock_run(tmp_path)
    assert is_locked(tmp_path)
    with pytest.raises(ConfigError, match=f"process {os.getpid()} on "):
        lock_run(tmp_path)
    release(mine)
    release(lock_run(tmp_path))


def test_the_holder_shows_itself_and_notices_a_usurper(tmp_path: Path) -> None:
    mine = lock_run(tmp_path)
    old = time.time() - 1000
    os.utime(tmp_path / ".lock", (old, old))
    presence = Presence(mine)
    assert presence.show() is None and (tmp_path / ".lock").stat().st_mtime > old + 900
    usurped = Presence(mine)
    write(tmp_path, THERE)
    assert usurped.show() == THERE
    release(mine)
    assert json.loads((tmp_path / ".lock").read_text())["key"] == "theirs"
