"""Named points of a save at which a test has a process die, stop, wait or fail. Without a fault they cost one comparison.

A fault is written `POINT=ACTION` or `POINT=ACTION@N` (the N-th time the point is passed, from 1; 1 if not given).
Actions: `kill` (SIGKILL to itself), `stop` (SIGSTOP), `sleep:SECONDS`, or an errno's name as `EIO`, raised as OSError.
"""

from __future__ import annotations

import errno
import os
import signal
import time

FLUSHER_POINTS = ("begin", "opened", "chunk", "before_fsync", "after_fsync", "before_manifest", "after_manifest")
COMMIT_POINTS = ("before_vote", "after_vote", "before_commit", "after_commit", "before_rename", "after_rename", "before_prune", "in_prune")


class Faults:
    """Counts passes of points and acts at the configured one."""

    def __init__(self, text: str = "") -> None:
        self.point, _, rest = text.partition("=")
        self.action, _, number = rest.partition("@")
        self._left = int(number or 1)
        assert not text or self.point in (*FLUSHER_POINTS, *COMMIT_POINTS), self.point

    def at(self, point: str) -> None:
        """Acts where `point` is the configured one and this is its time."""
        if point != self.point:
            return
        self._left -= 1
        if self._left == 0:
            self._act()

    def _act(self) -> None:
        if self.action == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        elif self.action == "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
        elif self.action.startswith("sleep:"):
            time.sleep(float(self.action[6:]))
        else:
            number = getattr(errno, self.action)
            raise OSError(number, os.strerror(number))
