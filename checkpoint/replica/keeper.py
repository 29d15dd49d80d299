"""Runs the process that keeps images of ranks in memory: `python -m efflaunch.checkpoint.replica.keeper SETTINGS`.

It outlives the trainer that started it, and ends with the trainer's guardian (the agent that restarts ranks: its end is the
end of the run here), when told to, or when nobody has spoken to it for IDLE_S. Nothing stays behind: the memory has no name.
Processes of the same node come by a socket in a folder of the user's own, others over TCP with a token. No torch.

Asked: `hello`, `claim`, `list`, `begin`, `chunk`, `end`, `read`, `manifest`, `keep`, `stop`; see the methods of _Connection.
"""

from __future__ import annotations

import contextlib
import hmac
import json
import os
import select
import socket
import sys
import threading
import time
from pathlib import Path
from typing import Any

from ...utils.signal_mask import ignore_stop_signals
from .images import Image, Images, RefusedError
from .stream import GoneError, Message, Stream

IDLE_S = 3600.0
_POLL_MS = 10_000
_QUESTIONS = ("hello", "claim", "list", "begin", "end", "read", "manifest", "keep", "spoil", "stop")


class ReplicaKeeper:
    """Listens for ranks until its end."""

    def __init__(self, path: Path, host: str, token: str, guardian: int) -> None:
        """Open the sockets; `guardian`: a descriptor (pidfd) that becomes readable when the agent ends; -1: none."""
        self.path, self.token, self.guardian = path, token, guardian
        self.images = Images()
        self.last_spoken = time.monotonic()
        self.num_callers = 0
        self._lock = threading.Lock()
        self.here = _listen_here(path)
        self.there = socket.create_server((host, 0), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
        self.port = int(self.there.getsockname()[1])
        self._bell, self._rope = os.pipe()

    def run(self) -> None:
        poll = select.poll()
        for descriptor in (self._bell, self.here.fileno(), self.there.fileno(), *([self.guardian] if self.guardian >= 0 else [])):
            poll.register(descriptor, select.POLLIN)
        try:
            while self.num_callers or time.monotonic() - self.last_spoken < IDLE_S:
                for descriptor, _ in poll.poll(_POLL_MS):
                    if descriptor in (self.guardian, self._bell):
                        return
                    self._accept(self.here if descriptor == self.here.fileno() else self.there)
        finally:
            self.path.unlink(missing_ok=True)
            with contextlib.suppress(OSError):
                # Others of this run may still be there.
                self.path.parent.rmdir()

    def end(self) -> None:
        """End at once."""
        os.write(self._rope, b"e")

    def hung_up(self) -> None:
        """Forget a caller that is gone."""
        with self._lock:
            self.num_callers -= 1
            self.last_spoken = time.monotonic()

    def _accept(self, listener: socket.socket) -> None:
        try:
            sock, _ = listener.accept()
        except OSError:
            # Whoever called has gone already.
            return
        trusted = listener is self.here
        with self._lock:
            self.num_callers += 1
        # No HelperThread: what ends one conversation is not the end of what is kept.
        threading.Thread(target=_Connection(self, Stream(sock), trusted).run, daemon=True).start()


def _listen_here(path: Path) -> socket.socket:
    path.unlink(missing_ok=True)
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    sock.bind(str(path))
    sock.listen(64)
    return sock


class _Connection:
    """Answers one caller's questions in order. A caller that is gone, or makes no sense, is hung up on."""

    def __init__(self, keeper: ReplicaKeeper, stream: Stream, trusted: bool) -> None:
        self.keeper, self.images, self.stream, self.trusted = keeper, keeper.images, stream, trusted
        self.image: Image | None = None
        """Image that arrives on this connection."""

    def run(self) -> None:
        try:
            while (message := self.stream.receive()) is not None:
                self.keeper.last_spoken = time.monotonic()
                if not self._answer(message):
                    return
        except (OSError, ValueError, KeyError, TypeError):
            # What it was sending is not complete and so does not count.
            pass
        finally:
            if self.image is not None:
                self.images.drop(self.image)
            self.stream.close()
            self.keeper.hung_up()

    def _answer(self, message: Message) -> bool:
        """Answer a question; False: hang up."""
        do = str(message["do"])
        if do == "hello":
            self.trusted = self.trusted or hmac.compare_digest(str(message["token"]), self.keeper.token)
        if not self.trusted:
            self.stream.send({"error": "not a caller of this run"})
            return False
        if do == "chunk":
            self._chunk(message)
            return True
        if do not in _QUESTIONS:
            self.stream.send({"error": f"{do} is no question"})
            return False
        try:
            answer, payload = getattr(self, f"_{do}")(message)
        except RefusedError as error:
            self.stream.send({"error": str(error)})
            return True
        self.stream.send(answer, payload)
        if do == "stop":
            self.keeper.end()
        return do != "stop"

    def _hello(self, message: Message) -> tuple[Message, bytes]:
        return {}, b""

    def _claim(self, message: Message) -> tuple[Message, bytes]:
        """Take the claim of a rank in a new life of the run."""
        self.images.claim(str(message["session"]))
        return {"port": self.keeper.port, "token": self.keeper.token, "pid": os.getpid()}, b""

    def _list(self, message: Message) -> tuple[Message, bytes]:
        return {"images": self.images.described(), "port": self.keeper.port, "token": self.keeper.token}, b""

    def _begin(self, message: Message) -> tuple[Message, bytes]:
        if self.image is not None:
            self.images.drop(self.image)
        self.image = None
        self.image = self.images.begin(message)
        return {}, b""

    def _chunk(self, message: Message) -> None:
        """Receive a chunk without an answer: `end` says whether all went well."""
        if self.image is None:
            raise GoneError("a chunk of nothing")
        name, offset, length = str(message["file"]), int(message["offset"]), int(message["bytes"])
        try:
            view = self.image.view(name, offset, length)
        except RefusedError as error:
            raise GoneError(str(error)) from error
        self.stream.take(view)
        self.images.arrived(self.image, name, offset, length)

    def _end(self, message: Message) -> tuple[Message, bytes]:
        """Complete an image with its manifest. From here on it counts."""
        data = self.stream.payload(message)
        if self.image is None:
            raise RefusedError("the end of nothing")
        image, self.image = self.image, None
        try:
            self.images.finish(image, data)
        except RefusedError:
            self.images.drop(image)
            raise
        return {}, b""

    def _read(self, message: Message) -> tuple[Message, memoryview]:
        image = self.images.find(str(message["attempt"]), int(message["rank"]))
        return {}, image.view(str(message["file"]), int(message["offset"]), int(message["length"]), cut=True)

    def _manifest(self, message: Message) -> tuple[Message, bytes]:
        image = self.images.find(str(message["attempt"]), int(message["rank"]))
        assert image.manifest is not None
        return {}, image.manifest

    def _keep(self, message: Message) -> tuple[Message, bytes]:
        self.images.keep(str(message["attempt"]))
        return {}, b""

    def _spoil(self, message: Message) -> tuple[Message, bytes]:
        """Change a byte of a complete image, for tests, as memory sometimes does."""
        view = self.images.find(str(message["attempt"]), int(message["rank"])).view(str(message["file"]), int(message["offset"]), 1)
        view[0] ^= 1
        return {}, b""

    def _stop(self, message: Message) -> tuple[Message, bytes]:
        return {}, b""


def main(arguments: list[str]) -> int:
    """Entry point; `SETTINGS` as JSON: path, host, guardian and ready (descriptors; ready receives the port, or why not)."""
    ignore_stop_signals()
    settings: dict[str, Any] = json.loads(arguments[0])
    token = os.urandom(16).hex()
    with os.fdopen(int(settings["ready"]), "w") as ready:
        try:
            keeper = ReplicaKeeper(Path(settings["path"]), str(settings["host"]), token, int(settings["guardian"]))
        except OSError as error:
            ready.write(json.dumps({"error": str(error)}))
            return 1
        ready.write(json.dumps({"port": keeper.port, "token": token}))
    keeper.run()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
