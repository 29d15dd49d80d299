"""One efflaunch per run directory, on this machine and on others that share its file system.

Two things say that somebody is there. The kernel's lock on `.lock` is held by every process of the run and ends with the
last of them; on NFS it reaches other nodes as well, on some file systems (Lustre with localflock, NFS with local_lock) it does
not, on some there is none. So `.lock` also says who has it, and its holder touches it every few seconds: an owner on
another machine whose last sign of life is young is believed, whatever the kernel says.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import secrets
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from ...errors import ConfigError
from ...units import format_seconds
from ...utils.decode import decode
from ...utils.text import typed
from .state import read_state

LOCK_FILE = ".lock"
SHOW_S = 5.0
STALE_S = 30.0
"""A holder that has shown no sign of life for so long is dead. Attributes may be that old in an NFS client's cache."""
_LOOKERS_S = 0.5
"""`status` takes the lock for a moment."""
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


@dataclass(frozen=True, kw_only=True, slots=True)
class Owner:
    """The process that has the run directory's lock."""

    host: str
    pid: int
    machine: str
    """Identity of the running kernel: equal for processes among which locks can be trusted."""
    since: float
    key: str
    """Identifies this holder among all others."""

    def describe(self, now: float) -> str:
        """`process 12 on n7, there since 2026-01-31 14:25:01 (2 h 5 min)`."""
        start = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(self.since))
        return f"process {self.pid} on {self.host}, there since {start} ({format_seconds(max(0.0, now - self.since))})"


def this_machine_id() -> str:
    """Return the boot id of the running kernel; the host's name where there is none."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return socket.gethostname()


def lock_run(run_dir: Path) -> int:
    """An open file that holds the run's lock for as long as any process that inherited it lives; `release` gives it back.

    ConfigError, naming the process, while another efflaunch runs there.
    """
    file = os.open(run_dir / LOCK_FILE, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        trusted = _take(file, fcntl.LOCK_EX, patience_s=_LOOKERS_S)
        owner, age = _owner(file), _age(run_dir, file)
        if trusted is None or is_held(owner, age, machine=this_machine_id(), trusted=trusted):
            raise _refusal(run_dir, owner, age)
        _write_owner(file, Owner(host=socket.gethostname(), pid=os.getpid(), machine=this_machine_id(), since=time.time(), key=_key()))
    except BaseException:
        os.close(file)
        raise
    return file


def is_held(owner: Owner | None, age_s: float, *, machine: str, trusted: bool) -> bool:
    """Return whether `owner`, whose last sign of life is `age_s` old, is still there though this process got the kernel's lock. Pure.

    `trusted`: the file system has locks. They always count among processes of one machine.
    """
    if owner is None or age_s > STALE_S:
        return False
    return owner.machine != machine or not trusted


def release(lock: int) -> None:
    """Give the lock back: nobody has to wait for a sign of life. Another's, who has taken it over, is left alone."""
    owner = _owner(lock)
    if owner is not None and (owner.pid, owner.machine) == (os.getpid(), this_machine_id()):
        os.ftruncate(lock, 0)
    os.close(lock)


def lock_in_time(run_dir: Path, patience_s: float = STALE_S + 30.0) -> int:
    """lock_run, for which the last processes of an earlier attempt may take a while to be gone."""
    deadline = time.monotonic() + patience_s
    while True:
        try:
            return lock_run(run_dir)
        except ConfigError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.5)


@contextmanager
def holding(run_dir: Path) -> Iterator[int]:
    """lock_run for the time inside."""
    lock = lock_run(run_dir)
    try:
        yield lock
    finally:
        release(lock)


def is_locked(run_dir: Path) -> bool:
    """Return whether some process of the run is alive."""
    try:
        file = os.open(run_dir / LOCK_FILE, os.O_RDONLY)
    except OSError:
        return False
    try:
        # Shared: on NFS only a file that is open for writing can be locked against others.
        trusted = _take(file, fcntl.LOCK_SH)
        return trusted is None or is_held(_owner(file), _age(run_dir, file), machine=this_machine_id(), trusted=trusted)
    finally:
        os.close(file)


class Presence:
    """The holder's sign of life."""

    def __init__(self, lock: int) -> None:
        self._lock, self._mine, self._next = lock, _owner(lock), 0.0

    def show(self) -> Owner | None:
        """Call it often. Touches the lock now and then; whoever has taken it over meanwhile, else None."""
        if time.monotonic() < self._next:
            return None
        self._next = time.monotonic() + SHOW_S
        owner = _owner(self._lock)
        if owner is not None and self._mine is not None and owner.key != self._mine.key:
            return owner
        os.utime(self._lock)
        return None


def _take(file: int, kind: int, patience_s: float = 0.0) -> bool | None:
    """True: this process has the kernel's lock; None: another one has it; False: the file system has none."""
    deadline = time.monotonic() + patience_s
    while True:
        try:
            fcntl.flock(file, kind | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if time.monotonic() >= deadline:
                return None
            time.sleep(0.05)
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
            return False


def _owner(file: int) -> Owner | None:
    """Read the owner in the lock file; None where it is empty, or is being written."""
    try:
        return decode(Owner, json.loads(os.pread(file, 4096, 0)))
    except (ValueError, RecursionError):
        return None


def _write_owner(file: int, owner: Owner) -> None:
    os.ftruncate(file, 0)
    os.pwrite(file, json.dumps(asdict(owner)).encode(), 0)
    os.fsync(file)


def _key() -> str:
    return secrets.token_hex(8)


def _age(run_dir: Path, file: int) -> float:
    """Seconds since the holder's last sign, by the file server's clock where this process may write there."""
    probe = run_dir / f".clock-{os.getpid()}-{_key()}"
    try:
        probe.touch()
        now = probe.stat().st_mtime
        probe.unlink()
    except OSError:
        # A reader's own clock will do: it only looks.
        now = time.time()
    return max(0.0, now - os.fstat(file).st_mtime)


def _refusal(run_dir: Path, owner: Owner | None, age_s: float) -> ConfigError:
    """Raised where the kernel's lock or a young sign of life shows that somebody is there."""
    state = read_state(run_dir)
    if owner is not None:
        holder = f"{owner.describe(time.time())}, heard of {format_seconds(age_s)} ago,"
    else:
        holder = f"process {state.pid} on {state.host}" if state else "another process"
    away = owner is not None and owner.machine != this_machine_id()
    stop = f"{typed('cancel', run_dir)}{f' on {owner.host}' if away and owner else ''} to stop it"
    dead = f" (if {owner.host} is down: in {STALE_S - age_s:.0f} s)" if away and owner and age_s <= STALE_S else ""
    return ConfigError(
        str(run_dir),
        found=f"{holder} running in it",
        expected="one efflaunch per run directory",
        hint=f"{typed('status', run_dir)}; {stop}{dead}; or another run.id",
    )
