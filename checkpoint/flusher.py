"""Runs the process that hashes and writes one rank's snapshots: `python -m efflaunch.checkpoint.flusher SOCKET`.

It shares the snapshot pool with its trainer and outlives it: when the trainer is killed, attempts whose every chunk has
been handed over are still written, and the next start commits them (files.adopt). It imports no torch, ignores stop
signals, and ends when the socket does and nothing is left to write.

Messages in: `pool` (with its descriptor), `begin`, `chunk`, `end`, `cancel`, `press` (the pool is full). Out: `free` (a segment
may be reused), `done` (an attempt is durable here, or why not), `replicated` (every keeper has its image, or why not).
"""

from __future__ import annotations

import mmap
import os
import queue
import socket
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Any

from ..utils.helper_thread import HelperThread, ends_with_helpers, print_death
from ..utils.signal_mask import ignore_stop_signals
from .disk_attempt import DiskAttempt
from .faults import Faults
from .flusher_protocol import Message, receive, send
from .manifest import digest
from .replica.send import Copying, Senders

WORKERS = 3
"""While one hashes, two write: a disk takes more from two."""


class CancelledError(Exception):
    """Raised where the trainer gave the attempt up."""


class _Countdown:
    """Calls `then` after `number` calls that each report a part as done."""

    def __init__(self, number: int, then: Callable[[], None]) -> None:
        self._number, self._then = number, then
        self._lock = threading.Lock()

    def __call__(self) -> None:
        with self._lock:
            self._number -= 1
            over = self._number == 0
        if over:
            self._then()


class Flusher:
    """Reads messages on one thread, opens and closes attempts on another, hashes and writes on WORKERS."""

    def __init__(self, sock: socket.socket, faults: Faults) -> None:
        self.sock, self.faults = sock, faults
        self.work: queue.SimpleQueue[Message | None] = queue.SimpleQueue()
        self.workers = ThreadPoolExecutor(WORKERS)
        self.pools: dict[int, tuple[memoryview, int]] = {}
        self.cancelled: set[str] = set()
        self.attempt: tuple[str, DiskAttempt] | None = None
        """The one that is open: they come one after the other."""
        self.copying: Copying | None = None
        self.senders = Senders(lambda attempt, error: self._send({"say": "replicated", "attempt": attempt, "error": error}))
        self.started = 0.0
        self._sending = threading.Lock()

    def run(self) -> None:
        """Run until the trainer's end is closed and all that was handed over is written."""
        writer = HelperThread(self._write_all, "writer")
        writer.start()
        while True:
            message, descriptor = receive(self.sock)
            if message is not None and message["do"] == "pool":
                assert descriptor is not None
                view = memoryview(mmap.mmap(descriptor, message["num_bytes"]))
                self.pools[0] = (view, int(message["segment_bytes"]))
                os.close(descriptor)
                continue
            if message is not None and message["do"] == "press":
                self.senders.press()
                continue
            if message is not None and message["do"] == "cancel":
                self.cancelled.add(message["attempt"])
            self.work.put(message)
            if message is None:
                break
        writer.join()

    def _write_all(self) -> None:
        while (message := self.work.get()) is not None:
            name = message["attempt"]
            try:
                getattr(self, f"_{message['do']}")(name, message)
            except (OSError, CancelledError) as error:
                self._fail(name, error)
                if message["do"] != "chunk":
                    self._let_go()
        self._let_go()
        self.senders.close()

    def _begin(self, name: str, message: Message) -> None:
        self._let_go()
        self.started = time.monotonic()
        self.attempt = (name, DiskAttempt(message, self.faults))
        # Not of an attempt that failed at once.
        self.copying = self.senders.begin(message)

    def _chunk(self, name: str, message: Message) -> None:
        attempt = self._of(name)
        copying = self.copying if attempt is not None and self.copying is not None and self.copying.attempt == name else None
        free = {"say": "free", "ticket": [message["segment"], message["generation"]]}
        done = _Countdown(1 + (len(copying.senders) if copying is not None else 0), lambda: self._send(free))
        view, segment_bytes = self.pools[0]
        start, length = message["segment"] * segment_bytes, message["length"]
        data, padded = view[start : start + length], view[start : start + -(-length // 4096) * 4096]
        if attempt is None:
            done()
            return
        if copying is not None:
            copying.chunk(attempt.names[message["file"]][0], message["offset"], data, done)
        attempt.parts.append(self.workers.submit(self._part, name, attempt, message, data, padded, done))

    def _part(self, name: str, attempt: DiskAttempt, message: Message, data: memoryview, padded: memoryview, done: _Countdown) -> None:
        """Hash and write one chunk, on a worker."""
        try:
            if attempt.error is None:
                self._check_wanted(name)
                attempt.hashes[message["file"]][message["offset"]] = "" if self.faults.unhashed else digest(data)
                attempt.write(message["file"], message["offset"], data, padded)
        except (OSError, CancelledError) as error:
            self._fail(name, error, attempt)
        finally:
            done()

    def _end(self, name: str, message: Message) -> None:
        attempt = self._of(name)
        if attempt is None:
            return
        for part in attempt.parts:
            # A mistake of ours ends this process: nobody may take such an attempt for good.
            part.result()
        self._check_wanted(name)
        if attempt.error is None:
            if self.copying is not None:
                self.copying.end(attempt.manifest().to_bytes())
            mode = attempt.files[0].mode
            data = attempt.finish(self.workers, lambda: self._check_wanted(name))
            seconds = time.monotonic() - self.started
            self._send({"say": "done", "attempt": name, "manifest": digest(data), "mode": mode, "write_s": seconds})
        self._let_go()

    def _cancel(self, name: str, message: Message) -> None:
        if self._of(name) is not None:
            self._fail(name, CancelledError("given up"))
            self._let_go()

    def _of(self, name: str) -> DiskAttempt | None:
        return self.attempt[1] if self.attempt is not None and self.attempt[0] == name else None

    def _let_go(self) -> None:
        """Release the open attempt, whatever became of it, once nobody writes any more."""
        if self.attempt is not None:
            wait(self.attempt[1].parts)
            self.attempt[1].close()
        self.attempt = None

    def _check_wanted(self, name: str) -> None:
        if name in self.cancelled:
            raise CancelledError("given up")

    def _fail(self, name: str, error: Exception, attempt: DiskAttempt | None = None) -> None:
        attempt = attempt or self._of(name)
        if attempt is not None and not attempt.fail(str(error)):
            return
        if self.copying is not None and self.copying.attempt == name:
            # Before the trainer hears of it: it then changes what is still being copied.
            self.copying.give_up(f"the save failed: {error}")
        self._send({"say": "done", "attempt": name, "error": str(error)})

    def _send(self, message: dict[str, Any]) -> None:
        try:
            with self._sending:
                send(self.sock, message)
        except OSError:
            # The trainer is dead; what is left to write is written all the same.
            pass


def main(arguments: list[str]) -> int:
    """Entry point with arguments `SOCKET [FAULT]`: the descriptor of the socket's end, and a fault for tests."""
    ignore_stop_signals()
    sock = socket.socket(fileno=int(arguments[0]))
    # Whatever ends a thread of it ends all: the trainer hears of a dead process, not of nothing.
    with ends_with_helpers(print_death):
        Flusher(sock, Faults(arguments[1] if len(arguments) > 1 else "")).run()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
