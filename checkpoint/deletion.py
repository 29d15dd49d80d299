"""Removes what retention let go of, in the background and not faster than asked: freeing much at once slows a file system down."""

from __future__ import annotations

import logging
import os
import queue
import threading
from collections.abc import Callable
from pathlib import Path

from ..utils.helper_thread import HelperThread
from . import files

log = logging.getLogger(__name__)
_STEP_BYTES = 256 << 20


class Trash:
    """Removes directories in one thread. What is left at the end of the process, the next start removes."""

    def __init__(self, bytes_per_s: int | None, at: Callable[[str], None] = lambda point: None) -> None:
        """Start the thread; `bytes_per_s` None: as fast as it goes. `at` is called with `in_prune` before each removal."""
        self.bytes_per_s, self._at = bytes_per_s, at
        self._queue: queue.SimpleQueue[Path | None] = queue.SimpleQueue()
        self._left, self._hurry = 0, False
        self._changed = threading.Condition()
        self._thread = HelperThread(self._run, "deletion")
        self._thread.start()

    def put(self, path: Path) -> None:
        """Queue a directory that counts for nothing any more."""
        with self._changed:
            self._left += 1
        self._queue.put(path)

    def wait_idle(self) -> None:
        """Wait until all is removed, now as fast as it goes."""
        with self._changed:
            self._hurry = True
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._left == 0)
            self._hurry = False

    def close(self) -> None:
        """End after what was put; does not wait."""
        self._queue.put(None)

    def _run(self) -> None:
        while (path := self._queue.get()) is not None:
            try:
                self._at("in_prune")
                self._remove(path)
            except OSError as error:
                log.error("what retention let go of stays behind: %s", error)
            with self._changed:
                self._left -= 1
                self._changed.notify_all()

    def _remove(self, path: Path) -> None:
        if self.bytes_per_s is not None:
            for file in sorted(path.iterdir()):
                self._shrink(file, self.bytes_per_s)
        files.remove_tree(path)

    def _shrink(self, file: Path, bytes_per_s: int) -> None:
        """Shrink a file from its end, a step at a time."""
        size = file.stat().st_size
        while size > 0 and not self._in_a_hurry():
            step = min(size, _STEP_BYTES)
            size -= step
            os.truncate(file, size)
            with self._changed:
                self._changed.wait_for(self._in_a_hurry, step / bytes_per_s)

    def _in_a_hurry(self) -> bool:
        """Whether somebody waits, or more comes than goes: disk space matters more then."""
        return self._hurry or self._left > 1
