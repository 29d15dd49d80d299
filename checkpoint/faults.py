"""Names points of a save at which a test has a process die, stop, wait or fail. Without a fault they cost one comparison.

A fault is written `POINT=ACTION` or `POINT=ACTION@N` (the N-th time the point is passed, from 1; 1 if not given).
Actions: `kill` (SIGKILL to itself), `stop` (SIGSTOP), `until:PATH` (waits for that file), or an errno's name as `EIO`, raised as
OSError.
`chunk=unhashed` is for measuring: nothing is hashed, and nothing that is written can be read back.
"""

from __future__ import annotations

import errno
import os
import signal
import threading
import time
from pathlib import Path

FLUSHER_POINTS = (
    "begin",
    "opened",
    "chunk",
    "before_fsync",
    "after_fsync",
    "before_manifest",
    "manifest_written",
    "manifest_synced",
    "manifest_renamed",
    "after_manifest",
)
COMMIT_POINTS = (
    "before_vote",
    "after_vote",
    "before_commit",
    "commit_written",
    "commit_synced",
    "commit_renamed",
    "after_commit",
    "folder_synced",
    "before_rename",
    "renamed",
    "after_rename",
    "before_prune",
    "in_prune",
)
RANK_0_POINTS = COMMIT_POINTS[2:]
"""Only rank 0 passes these."""


class Faults:
    """Counts passes of points and acts at the configured one."""

    def __init__(self, text: str = "") -> None:
        self.point, _, rest = text.partition("=")
        self.action, _, number = rest.partition("@")
        self._left = int(number or 1)
        self.unhashed = self.action == "unhashed"
        self._lock = threading.Lock()
        assert not text or self.point in (*FLUSHER_POINTS, *COMMIT_POINTS), self.point

    def at(self, point: str) -> None:
        """Act where `point` is the configured one and this is its time."""
        if point != self.point or self.unhashed:
            return
        with self._lock:
            self._left -= 1
            acts = self._left == 0
        if acts:
            self._act()

    def _act(self) -> None:
        if self.action == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        elif self.action == "stop":
            # To this very thread: one sent to the process may reach another thread first, and this one goes on for a moment.
            signal.pthread_kill(threading.get_ident(), signal.SIGSTOP)
        elif self.action.startswith("until:"):
            while not Path(self.action[6:]).exists():
                time.sleep(0.01)
        else:
            number = getattr(errno, self.action)
            raise OSError(number, os.strerror(number))
