"""Connects a trainer to its flusher: starts it, hands it the pool, receives its messages, notices its death."""

from __future__ import annotations

import logging
import signal
import subprocess
import sys
import threading
import time

from ..utils.helper_thread import HelperThread
from ..utils.signal_mask import stop_signals_blocked
from .attempt import Attempt, Flushed
from .flusher_protocol import Message, make_pair, receive, send
from .pool import Pool
from .segment_pool import SegmentPool, StaleTicketError, Ticket

log = logging.getLogger(__name__)
_MODULE = f"{__package__}.flusher"


class FlusherDiedError(Exception):
    """The flusher process is gone; the attempt it worked on is lost, the next one starts another."""


class FlusherProcess:
    """Owns one flusher process; `last_message_s` is the time of its last message."""

    def __init__(self, pool: Pool, ring: SegmentPool, segment_bytes: int, fault: str = "") -> None:
        self._ring = ring
        self._attempts: dict[str, Attempt] = {}
        self._copying: dict[str, Attempt] = {}
        """Attempts whose replica is on its way."""
        self._lock = threading.Lock()
        self._condemned = False
        self._sock, far = make_pair()
        command = [sys.executable, "-m", _MODULE, str(far.fileno()), fault]
        # A session of its own: a Ctrl-C at the terminal and a kill of the trainer's group are not meant for it.
        with stop_signals_blocked():
            self._process = subprocess.Popen(
                command, pass_fds=(far.fileno(),), stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, start_new_session=True
            )
        far.close()
        self.last_message_s = time.monotonic()
        self.send({"do": "pool", "num_bytes": pool.num_bytes, "segment_bytes": segment_bytes}, pool.descriptor)
        self._listener = HelperThread(self._listen, "flusher listener")
        self._listener.start()

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def is_alive(self) -> bool:
        return self._listener.is_alive() and not self._condemned

    def begin(self, attempt: Attempt) -> None:
        """Take over an attempt, which is settled from here on whatever happens to the process."""
        with self._lock:
            self._attempts[attempt.name] = attempt
            if attempt.replica is not None:
                self._copying[attempt.name] = attempt
        needs = attempt.layout.total_bytes if attempt.facts["rank"] == 0 else 0
        message: Message = {"do": "begin", "attempt": attempt.name, "folder": str(attempt.folder), "files": attempt.files}
        self.send({**message, "facts": attempt.facts, "needs_bytes": needs, "replica": attempt.replica})

    def send(self, message: Message, descriptor: int | None = None) -> None:
        """Send a message; FlusherDiedError where nobody listens."""
        try:
            send(self._sock, message, descriptor)
        except OSError as error:
            raise FlusherDiedError(self.last_words()) from error

    def _listen(self) -> None:
        while True:
            message, _ = receive(self._sock)
            if message is None:
                break
            self.last_message_s = time.monotonic()
            if message["say"] == "free":
                self._free(Ticket(*message["ticket"]))
            elif message["say"] == "replicated":
                self._replicated(message)
            else:
                self._done(message)
        words = self.last_words()
        with self._lock:
            left, self._attempts = list(self._attempts.values()), {}
            copying, self._copying = list(self._copying.values()), {}
        for attempt in left:
            attempt.settle(Flushed(words))
        for attempt in copying:
            attempt.settle_replica(words)

    def _replicated(self, message: Message) -> None:
        with self._lock:
            attempt = self._copying.pop(message["attempt"], None)
        if attempt is not None:
            attempt.settle_replica(message["error"])

    def _free(self, ticket: Ticket) -> None:
        try:
            self._ring.release(ticket)
        except StaleTicketError:
            log.exception("the flusher returned a segment it does not hold")

    def _done(self, message: Message) -> None:
        with self._lock:
            attempt = self._attempts.pop(message["attempt"], None)
        if attempt is None:
            return
        error = message.get("error")
        if error is not None:
            attempt.settle(Flushed(error))
            return
        attempt.settle(Flushed(None, message["manifest"], message["mode"], message["write_s"]))

    def last_words(self) -> str:
        """Describe how the process ended."""
        try:
            code = self._process.wait(5)
        except subprocess.TimeoutExpired:
            return f"the flusher process {self.pid} does not answer"
        how = f"was killed by signal {-code} ({signal.Signals(-code).name})" if code < 0 else f"ended with code {code}"
        return f"the flusher process {self.pid} {how}"

    def kill(self) -> None:
        """Kill a process that hangs in the file system. No attempt is given to it any more."""
        self._condemned = True
        self._process.kill()

    def close(self, timeout_s: float) -> None:
        """Take no more attempts; returns when it has ended, or after `timeout_s`: it finishes by itself then."""
        self._sock.shutdown(1)
        self._listener.join(timeout_s)
        if not self._listener.is_alive():
            self._sock.close()
