"""Connects a rank to its keeper, left running or started anew, and names the folder where keepers of a node are met."""

from __future__ import annotations

import json
import os
import select
import stat
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from ...utils.signal_mask import stop_signals_blocked
from ..manifest import digest
from .plan import StoredImage
from .stream import Address, Stream, connect_here

ANSWER_S = 10.0
"""Longest time a living keeper takes for an answer of a few bytes."""
_MODULE = f"{__package__}.keeper"


def meeting_path(directory: Path, node: str) -> Path:
    """The folder where the keepers of one run on one node are met, if there are any."""
    base = Path(tempfile.gettempdir()) / f"efflaunch-{os.getuid()}"
    return base / f"{digest(str(directory.absolute()).encode())}-{digest(node.encode())[:6]}"


def meeting_folder(directory: Path, node: str) -> Path:
    """Make the folder of meeting_path; only its user may enter. OSError where that cannot be had."""
    folder = meeting_path(directory, node)
    for path in (folder.parent, folder):
        path.mkdir(mode=0o700, exist_ok=True)
        status = path.lstat()
        if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid() or status.st_mode & 0o077:
            raise PermissionError(f"{path} is not a folder of this user alone")
    return folder


def look(folder: Path, node: str, host: str) -> tuple[list[StoredImage], int]:
    """List what the keepers of this node hold, and how many bytes in all. A keeper that does not answer holds nothing."""
    images: list[StoredImage] = []
    num_bytes = 0
    for path in sorted(folder.glob("keeper-*")):
        try:
            stream = connect_here(path, ANSWER_S)
        except OSError:
            # Killed: its memory is gone, its socket stayed.
            path.unlink(missing_ok=True)
            continue
        try:
            answer = stream.ask({"do": "list"})
        except OSError:
            continue
        finally:
            stream.close()
        address = Address(node, str(path), host, int(answer["port"]), str(answer["token"]))
        images += [StoredImage.from_json(image, address) for image in answer["images"]]
        num_bytes += sum(int(image["num_bytes"]) for image in answer["images"])
    return images, num_bytes


def send(path: Path, message: dict[str, Any]) -> dict[str, Any] | None:
    """Send a message to a keeper of this node; returns its answer, None where there is none."""
    try:
        stream = connect_here(path, ANSWER_S)
        try:
            return stream.ask(message)
        finally:
            stream.close()
    except OSError:
        return None


class KeeperProcess:
    """The keeper of this rank. A life before may have started it; then it is not our child."""

    def __init__(self, folder: Path, node: str, rank: int, host: str, session: str) -> None:
        """Connect to a keeper, or start one (OSError: neither). `host`: the address others reach it at, if there are others."""
        path = folder / f"keeper-{rank}"
        self._child: subprocess.Popen[bytes] | None = None
        answer = send(path, {"do": "claim", "session": session}) if path.exists() else None
        if answer is None:
            self._child = _start(path, host)
            answer = send(path, {"do": "claim", "session": session})
        if answer is None:
            raise OSError(f"the keeper at {path} does not answer")
        self.pid = int(answer["pid"])
        self.address = Address(node, str(path), host, int(answer["port"]), str(answer["token"]))
        # Its end of the line falls when it dies.
        self._line: Stream = connect_here(path, ANSWER_S)

    @property
    def is_alive(self) -> bool:
        # It says nothing unasked: what can be read is the end.
        return self._line.sock.fileno() >= 0 and not select.select([self._line.sock], [], [], 0)[0]

    def keep(self, attempt: str) -> None:
        """Keep only images of that attempt; OSError where the keeper is gone."""
        self._line.ask({"do": "keep", "attempt": attempt})

    def leave(self) -> None:
        """Leave it running, for the next life."""
        self._line.close()

    def stop(self) -> None:
        """End it, and what it holds with it."""
        send(Path(self.address.path), {"do": "stop"})
        self.reap()
        self._line.close()

    def reap(self) -> None:
        """Collect the exit status of one that ended."""
        if self._child is not None:
            try:
                self._child.wait(ANSWER_S)
            except subprocess.TimeoutExpired:
                self._child.kill()
                self._child.wait()


def _start(path: Path, host: str) -> subprocess.Popen[bytes]:
    """Start a keeper that ends with our parent: the agent, which starts the next life."""
    read_end, write_end = os.pipe()
    guardian = _parent()
    settings = {"path": str(path), "host": host, "guardian": guardian, "ready": write_end}
    passed = (write_end, guardian) if guardian >= 0 else (write_end,)
    command = [sys.executable, "-m", _MODULE, json.dumps(settings)]
    try:
        with stop_signals_blocked():
            child = subprocess.Popen(command, pass_fds=passed, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, start_new_session=True)
    finally:
        os.close(write_end)
        if guardian >= 0:
            os.close(guardian)
    with os.fdopen(read_end) as ready:
        reply = ready.read()
    answer = json.loads(reply) if reply else {"error": "it ended at once"}
    if "error" in answer:
        child.wait()
        raise OSError(f"no keeper at {path}: {answer['error']}")
    return child


def _parent() -> int:
    """A descriptor that becomes readable when our parent ends; -1 where the system has none."""
    try:
        return os.pidfd_open(os.getppid())
    except OSError:
        return -1
