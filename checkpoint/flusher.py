"""The process that hashes and writes one rank's snapshots: `python -m efflaunch.checkpoint.flusher SOCKET`.

It shares the snapshot pool with its trainer and outlives it: when the trainer is killed, attempts whose every chunk has
been handed over are still written, and the next start commits them (files.adopt). It imports no torch, ignores stop
signals, and ends when the socket does and nothing is left to write.

Messages in: `pool` (with its descriptor), `begin`, `chunk`, `end`, `cancel`. Out: `free` (a segment may be reused),
`done` (an attempt is durable here, or why not), `said` (a line for the log).
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import queue
import socket
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from ..children import stay_deaf
from ..durable import sync
from .diskfile import DiskFile
from .faults import Faults
from .manifest import FileRecord, Manifest, digest, manifest_name
from .wire import Message, receive, send


class CancelledError(Exception):
    """The trainer gave the attempt up."""


class Attempt:
    """One rank's files of one attempt, while they are being written."""

    def __init__(self, message: Message, faults: Faults) -> None:
        self.folder, self.facts, self.faults = Path(message["folder"]), message["facts"], faults
        self.names: list[tuple[str, int]] = [(str(name), int(size)) for name, size in message["files"]]
        self.files: list[DiskFile] = []
        self.hashes: list[list[Future[str]]] = [[] for _ in self.names]
        self.write_s = 0.0
        self.faults.at("begin")
        self.folder.mkdir(parents=True, exist_ok=True)
        _check_room(self.folder, int(message["needs_bytes"]))
        for name, size in self.names:
            self.files.append(DiskFile(self.folder / name, size))
        # Held until the manifest is there: who finds the lock free and no manifest knows that none will come.
        _lock(self.files[0].descriptor)
        self.faults.at("opened")

    def write(self, file: int, offset: int, data: memoryview, padded: memoryview) -> None:
        """`padded` is `data` up to the end of its last block."""
        self.faults.at("chunk")
        started = time.monotonic()
        self.files[file].write(offset, data, padded)
        self.write_s += time.monotonic() - started

    def finish(self, check: Callable[[], None]) -> tuple[str, int]:
        """Everything durable; hash and size of the manifest. `check` may raise as long as there is none."""
        self.faults.at("before_fsync")
        started = time.monotonic()
        for file in self.files:
            file.finish()
        self.write_s += time.monotonic() - started
        self.faults.at("after_fsync")
        records = (
            FileRecord(name, size, tuple(part.result() for part in parts))
            for (name, size), parts in zip(self.names, self.hashes, strict=True)
        )
        check()
        data = Manifest(**self.facts, files=tuple(records)).to_bytes()
        self.faults.at("before_manifest")
        path = self.folder / manifest_name(self.facts["rank"])
        part = path.with_name(path.name + ".part")
        with part.open("wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        part.rename(path)
        sync(self.folder)
        self.faults.at("after_manifest")
        self.close()
        return digest(data), len(data)

    def close(self) -> None:
        for file in self.files:
            file.close()


def _lock(descriptor: int) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        # A file system without locks: a start that comes while this writes does not wait for it, and the attempt is lost.
        if error.errno not in (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS):
            raise


def _check_room(folder: Path, needs_bytes: int) -> None:
    stat = os.statvfs(folder)
    free = stat.f_bavail * stat.f_frsize
    if free < needs_bytes:
        raise OSError(28, f"No space left on device: needs {needs_bytes} bytes for all ranks, {free} free", str(folder))


class Flusher:
    """Reads messages on one thread, writes on another, hashes on a third."""

    def __init__(self, sock: socket.socket, faults: Faults) -> None:
        self.sock, self.faults = sock, faults
        self.work: queue.SimpleQueue[Message | None] = queue.SimpleQueue()
        self.hasher = ThreadPoolExecutor(1)
        self.pools: dict[int, tuple[memoryview, int]] = {}
        self.cancelled: set[str] = set()
        self.attempts: dict[str, Attempt | str] = {}
        """By name; a text where it has failed already."""
        self._sending = threading.Lock()

    def run(self) -> None:
        """Until the trainer's end is closed and all that was handed over is written."""
        writer = threading.Thread(target=self._write_all)
        writer.start()
        while True:
            message, descriptor = receive(self.sock)
            if message is not None and message["do"] == "pool":
                assert descriptor is not None
                view = memoryview(mmap.mmap(descriptor, message["num_bytes"]))
                self.pools[0] = (view, int(message["segment_bytes"]))
                os.close(descriptor)
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
                self._one(name, message)
            except (OSError, CancelledError) as error:
                self._fail(name, error)
            if message["do"] == "chunk":
                self._free(name, message)

    def _one(self, name: str, message: Message) -> None:
        if message["do"] == "begin":
            self.attempts[name] = ""
            self.attempts[name] = Attempt(message, self.faults)
        attempt = self.attempts.get(name)
        if not isinstance(attempt, Attempt):
            if message["do"] in ("end", "cancel"):
                self.attempts.pop(name, None)
            return
        self._check_wanted(name)
        if message["do"] == "chunk":
            self._chunk(attempt, message)
        elif message["do"] == "end":
            self._finish(name, attempt)

    def _check_wanted(self, name: str) -> None:
        if name in self.cancelled:
            raise CancelledError("given up")

    def _chunk(self, attempt: Attempt, message: Message) -> None:
        view, segment_bytes = self.pools[0]
        start, length = message["segment"] * segment_bytes, message["length"]
        data = view[start : start + length]
        attempt.hashes[message["file"]].append(self.hasher.submit(digest, data))
        attempt.write(message["file"], message["offset"], data, view[start : start + -(-length // 4096) * 4096])

    def _finish(self, name: str, attempt: Attempt) -> None:
        mode = attempt.files[0].mode
        found, size = attempt.finish(lambda: self._check_wanted(name))
        del self.attempts[name]
        self._send({"say": "done", "attempt": name, "manifest": [found, size], "mode": mode, "write_s": attempt.write_s})

    def _fail(self, name: str, error: Exception) -> None:
        attempt = self.attempts.get(name)
        if isinstance(attempt, Attempt):
            attempt.close()
        self.attempts[name] = "failed"
        self._send({"say": "done", "attempt": name, "error": str(error)})

    def _free(self, name: str, message: Message) -> None:
        attempt = self.attempts.get(name)
        if isinstance(attempt, Attempt) and attempt.hashes[message["file"]]:
            # The hash may still be reading what has been written.
            attempt.hashes[message["file"]][-1].result()
        else:
            self.hasher.submit(int).result()
        self._send({"say": "free", "ticket": [message["segment"], message["generation"]]})

    def _send(self, message: dict[str, Any]) -> None:
        try:
            with self._sending:
                send(self.sock, message)
        except OSError:
            # The trainer is dead; what is left to write is written all the same.
            pass


def main(arguments: list[str]) -> int:
    """`SOCKET [FAULT]`: the descriptor of the socket's end, and a fault for tests."""
    stay_deaf()
    sock = socket.socket(fileno=int(arguments[0]))
    Flusher(sock, Faults(arguments[1] if len(arguments) > 1 else "")).run()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
