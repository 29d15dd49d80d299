"""Sends a rank's image from its flusher to its keepers: one connection and one thread for each. No torch.

Training does not wait for it: what is not there when the next save begins is given up, and so is what a keeper does not take
for STUCK_S while the snapshot needs the memory.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from typing import Any

from ...utils.helper_thread import HelperThread
from .stream import Address, Message, Stream, connect

STUCK_S = 1.0


def _nothing() -> None:
    pass


class Copying:
    """Sends one attempt's image to every one of its keepers; `on_end(error)` is called once, at its end."""

    def __init__(self, attempt: str, senders: list[Sender], on_end: Callable[[str | None], None]) -> None:
        self.attempt, self.senders = attempt, senders
        self._left, self._on_end = len(senders), on_end
        self._over = False
        self._items: list[_Item] = []
        self._lock = threading.Lock()

    @property
    def is_over(self) -> bool:
        return self._over

    def begin(self, message: Message) -> None:
        for sender in self.senders:
            self._put(sender, _Item(self, message))

    def chunk(self, file: str, offset: int, data: memoryview, done: Callable[[], None]) -> None:
        """Send a chunk; `done` is called once for each keeper, when the bytes are no longer needed."""
        for sender in self.senders:
            self._put(sender, _Item(self, {"do": "chunk", "file": file, "offset": offset}, data, done))

    def end(self, manifest: bytes) -> None:
        for sender in self.senders:
            self._put(sender, _Item(self, {"do": "end"}, memoryview(manifest)))

    def _put(self, sender: Sender, item: _Item) -> None:
        with self._lock:
            over = self._over
            if not over:
                self._items.append(item)
        if over:
            item.release()
        else:
            sender.put(item)

    def arrived(self) -> None:
        """Record that one keeper has all of it."""
        with self._lock:
            self._left -= 1
            last = self._left == 0 and not self._over
            self._over = self._over or last
            if last:
                self._items.clear()
        if last:
            self._on_end(None)

    def give_up(self, why: str) -> None:
        """Give the image up; no effect on one that is over. Its senders stop."""
        with self._lock:
            if self._over:
                return
            self._over = True
            items, self._items = self._items, []
        for item in items:
            if item.take():
                # What waits behind something that hangs is not needed any more.
                item.release()
        for sender in self.senders:
            sender.interrupt(self)
        self._on_end(why)


class _Item:
    """One message to one keeper, taken once: by its sender, or by who gives it up."""

    def __init__(self, copying: Copying, message: Message, data: memoryview | None = None, done: Callable[[], None] = _nothing) -> None:
        self.copying, self.message, self.data = copying, message, data
        self.release = done
        self._taken = False
        self._lock = threading.Lock()

    def take(self) -> bool:
        with self._lock:
            first, self._taken = not self._taken, True
            return first


class Sender:
    """Sends messages to one keeper, in order."""

    def __init__(self, address: Address, node: str, timeout_s: float) -> None:
        """Start the thread; `timeout_s`: longest silence of the other end."""
        self.address, self._node, self._timeout_s = address, node, timeout_s
        self._queue: queue.SimpleQueue[_Item | None] = queue.SimpleQueue()
        self._stream: Stream | None = None
        self._current: tuple[Copying, float] | None = None
        """Image it sends, and since when."""
        self._interrupted = False
        """The connection is of no use any more, whether or not somebody has noticed."""
        self._lock = threading.Lock()
        self._thread = HelperThread(self._run, "replica sender")
        self._thread.start()

    def put(self, item: _Item) -> None:
        self._queue.put(item)

    def interrupt(self, copying: Copying) -> None:
        """Interrupt what is being sent of that image."""
        with self._lock:
            if self._current is not None and self._current[0] is copying and self._stream is not None:
                self._stream.interrupt()
                self._interrupted = True

    def stuck_s(self) -> float:
        """Seconds it has been at one message."""
        current = self._current
        return 0.0 if current is None else time.monotonic() - current[1]

    def close(self, *, wait: bool) -> None:
        """End after what was put; `wait`: return only then."""
        self._queue.put(None)
        if wait:
            self._thread.join()

    def _run(self) -> None:
        while (item := self._queue.get()) is not None:
            if not item.take():
                continue
            with self._lock:
                self._current = (item.copying, time.monotonic())
            try:
                if not item.copying.is_over:
                    self._do(item)
            except OSError as error:
                self._hang_up()
                item.copying.give_up(f"the keeper at {self.address.node} ({self.address.host}:{self.address.port}): {error}")
            finally:
                item.release()
                with self._lock:
                    self._current = None
        self._hang_up()

    def _do(self, item: _Item) -> None:
        do = item.message["do"]
        if do == "begin" and self._interrupted:
            self._hang_up()
        if do == "begin" and self._stream is None:
            stream = connect(self.address, self._node, self._timeout_s)
            with self._lock:
                self._stream = stream
        if self._stream is None:
            raise OSError("the connection was lost")
        if do == "begin":
            self._stream.ask(item.message)
        elif do == "chunk":
            assert item.data is not None
            self._stream.send(item.message, item.data)
        else:
            assert item.data is not None
            self._stream.ask(item.message, item.data)
            item.copying.arrived()

    def _hang_up(self) -> None:
        with self._lock:
            stream, self._stream, self._interrupted = self._stream, None, False
        if stream is not None:
            stream.close()


class Senders:
    """The senders of one flusher: those of the newest attempt's keepers stay connected."""

    def __init__(self, on_end: Callable[[str, str | None], None]) -> None:
        """Open it; `on_end(attempt, error)`: how it went; error None: every keeper has all of it."""
        self._on_end = on_end
        self._senders: dict[Address, Sender] = {}
        self.current: Copying | None = None

    def begin(self, message: dict[str, Any]) -> Copying | None:
        """Begin an image from a flusher's `begin`; None where no replica is asked for. An unfinished one before is given up."""
        if self.current is not None:
            self.current.give_up("not there when the next save began")
        wanted: dict[str, Any] | None = message.get("replica")
        self.current = None
        if wanted is None:
            return None
        attempt, facts = str(message["attempt"]), message["facts"]
        addresses = [Address.from_json(fields) for fields in wanted["keepers"]]
        for gone in self._senders.keys() - set(addresses):
            self._senders.pop(gone).close(wait=False)
        for address in addresses:
            if address not in self._senders:
                self._senders[address] = Sender(address, str(wanted["node"]), float(wanted["timeout_s"]))
        self.current = Copying(attempt, [self._senders[a] for a in addresses], lambda error: self._on_end(attempt, error))
        begin = {"do": "begin", "attempt": attempt, "agreed": wanted["agreed"], "files": message["files"]}
        self.current.begin({**begin, "step": facts["step"], "rank": facts["rank"], "world_size": facts["world_size"]})
        return self.current

    def press(self) -> None:
        """Give up an image whose keeper keeps the snapshot waiting for memory."""
        current = self.current
        if current is None or current.is_over:
            return
        for sender in current.senders:
            if sender.stuck_s() > STUCK_S:
                current.give_up(f"the keeper at {sender.address.node} takes nothing, and the snapshot needs the memory")

    def close(self) -> None:
        """Close when all that was put is there, or lost."""
        for sender in self._senders.values():
            sender.close(wait=True)
