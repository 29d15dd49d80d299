"""Copies snapshots into the pool behind the trainer's back, and hands them to the flusher chunk by chunk."""

from __future__ import annotations

import logging
import queue
import time
from collections import deque
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..utils.helper_thread import HelperThread
from .archive import Copy
from .attempt import Attempt, Flushed
from .flusher_process import FlusherDiedError, FlusherProcess
from .pool import Pool, copy_memory
from .segment_pool import SegmentPool, Ticket

log = logging.getLogger(__name__)


class CancelledError(Exception):
    """Raised where the attempt was given up while it was being copied."""


class _Chunk(NamedTuple):
    message: dict[str, Any]
    event: Any
    """CUDA event after which the segment holds the chunk; None: it does already."""


class Saver:
    """Owns pool, ring, flusher and the copy thread of one rank. Attempts are taken one after the other."""

    def __init__(
        self,
        pool_bytes: int,
        segment_bytes: int,
        device: torch.device,
        fault: str = "",
        replicate: Callable[[Attempt], None] = lambda attempt: None,
    ) -> None:
        """Open it; `replicate` enters in the attempt where its image goes besides."""
        self._replicate, self._abandoned = replicate, False
        self.segment_bytes, self.device, self._fault = segment_bytes, device, fault
        self.ring = SegmentPool(pool_bytes // segment_bytes)
        self.pool = Pool(pool_bytes, device, segment_bytes)
        self.flusher: FlusherProcess | None = None
        self.delay_s = 0.0
        """Pause after each chunk; set by the throttle."""
        self._stream: Any = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._queue: queue.SimpleQueue[Attempt | None] = queue.SimpleQueue()
        self._thread = HelperThread(self._run, "snapshots")
        self._thread.start()

    def start(self, attempt: Attempt) -> None:
        """Start an attempt and return at once; `attempt.enqueued`, `copied` and `settled` follow."""
        self._queue.put(attempt)

    def cancel(self, attempt: Attempt) -> None:
        """Give it up, unless every rank has voted for it already."""
        attempt.cancelled = True
        if self.flusher is not None:
            try:
                self.flusher.send({"do": "cancel", "attempt": attempt.name})
            except FlusherDiedError:
                # Then it is settled, or will be.
                pass

    def close(self, timeout_s: float) -> None:
        """End after the attempts that were started; the flusher may finish alone after `timeout_s`."""
        self._queue.put(None)
        self._thread.join(timeout_s)
        if self.flusher is not None:
            self.flusher.close(timeout_s)
        if not self._thread.is_alive():
            # Otherwise it still copies into it; then the pool goes with the process.
            self.pool.close()

    def abandon(self) -> None:
        """Close without waiting: nobody is left who would."""
        self._abandoned = True
        self._queue.put(None)

    def _run(self) -> None:
        if self._stream is not None:
            torch.cuda.set_device(self.device)
        # Before it is needed.
        self._new_flusher()
        while (attempt := self._queue.get()) is not None:
            try:
                self._copy(attempt)
                attempt.snapshot_s = time.monotonic() - attempt.started
                attempt.enqueued.set()
                attempt.copied.set()
            except CancelledError:
                attempt.settle(Flushed("superseded by a newer save"))
            except FlusherDiedError as error:
                attempt.settle(Flushed(str(error)))
            except Exception as error:  # this thread must live: whatever it is, the attempt fails with it
                log.debug("snapshot of step %d", attempt.step, exc_info=True)
                attempt.settle(Flushed(f"{type(error).__name__}: {error}"))
            attempt.sources.clear()
        if self._abandoned and self.flusher is not None:
            self.flusher.close(0.0)

    def _new_flusher(self) -> FlusherProcess:
        if self._stream is not None:
            self._stream.synchronize()
        if self.flusher is not None:
            log.warning("checkpoints: %s; another one takes its place", self.flusher.last_words())
            self.flusher.kill()
            self.flusher.close(5.0)
        self.ring.reset()
        self.flusher = FlusherProcess(self.pool, self.ring, self.segment_bytes, self._fault)
        # A fault strikes one process, not its successors.
        self._fault = ""
        return self.flusher

    def _copy(self, attempt: Attempt) -> None:
        flusher = self.flusher if self.flusher is not None and self.flusher.is_alive else self._new_flusher()
        if attempt.cancelled:
            raise CancelledError
        self._replicate(attempt)
        flusher.begin(attempt)
        self.pool.wait_ready()
        if self._stream is not None and attempt.after is not None:
            self._stream.wait_event(attempt.after)
        pending: deque[_Chunk] = deque()
        try:
            for copies, message in self._chunks(attempt):
                self._hand_over(flusher, pending, wait=False)
                ticket = self._acquire(attempt, flusher, pending)
                self._fill(ticket, copies, attempt.sources)
                message |= {"segment": ticket.segment, "generation": ticket.generation}
                pending.append(_Chunk(message, self._mark()))
                if self.delay_s:
                    time.sleep(self.delay_s)
            attempt.copy_event = self._mark()
            attempt.snapshot_s = time.monotonic() - attempt.started
            attempt.enqueued.set()
            self._hand_over(flusher, pending, wait=True)
        except CancelledError:
            flusher.send({"do": "cancel", "attempt": attempt.name})
            raise
        flusher.send({"do": "end", "attempt": attempt.name})

    def _chunks(self, attempt: Attempt) -> Any:
        """Copies and message of every chunk of every file, in the order of the files."""
        head = {"do": "chunk", "attempt": attempt.name}
        size = self.segment_bytes
        for number, copies in enumerate(attempt.layout.chunks):
            length = min(size, attempt.layout.num_bytes - number * size)
            yield copies, {**head, "file": 0, "offset": number * size, "length": length}
        for file, (_, text) in enumerate(attempt.texts, start=1):
            for offset in range(0, len(text), size):
                part = text[offset : offset + size]
                yield (Copy(0, len(part), text=part),), {**head, "file": file, "offset": offset, "length": len(part)}

    def _acquire(self, attempt: Attempt, flusher: FlusherProcess, pending: deque[_Chunk]) -> Ticket:
        if not self.ring.num_free:
            # What is in the pool must go out, or nothing comes free.
            self._hand_over(flusher, pending, wait=True)

        def given_up() -> bool:
            if attempt.replica is not None and flusher.is_alive:
                flusher.send({"do": "press"})
            return attempt.cancelled or attempt.settled.is_set() or not flusher.is_alive

        ticket = self.ring.acquire(given_up)
        if ticket is None:
            if attempt.cancelled:
                raise CancelledError
            raise FlusherDiedError(attempt.flushed.error if attempt.flushed is not None else "the flusher process is gone")
        return ticket

    def _fill(self, ticket: Ticket, copies: tuple[Copy, ...], sources: list[Tensor]) -> None:
        base = ticket.segment * self.segment_bytes
        for copy in copies:
            if copy.piece < 0:
                copy_memory(self.pool.address + base + copy.at, copy.text, copy.num_bytes)
                continue
            source = sources[copy.piece]
            if not source.is_contiguous():
                with self._on_stream():
                    source = sources[copy.piece] = source.contiguous()
            if source.device.type == "cpu":
                copy_memory(self.pool.address + base + copy.at, source.data_ptr() + copy.begin, copy.num_bytes)
            else:
                self._fetch(base + copy.at, source, copy)

    def _fetch(self, at: int, source: Tensor, copy: Copy) -> None:
        numbers = source.reshape(-1).view(torch.uint8)[copy.begin : copy.begin + copy.num_bytes]
        with self._on_stream():
            self.pool.view[at : at + copy.num_bytes].copy_(numbers, non_blocking=True)

    def _on_stream(self) -> AbstractContextManager[Any]:
        return nullcontext() if self._stream is None else torch.cuda.stream(self._stream)

    def _mark(self) -> Any:
        if self._stream is None:
            return None
        event = torch.cuda.Event()
        event.record(self._stream)
        return event

    def _hand_over(self, flusher: FlusherProcess, pending: deque[_Chunk], *, wait: bool) -> None:
        """Tell the flusher of the chunks that are in the pool, in order."""
        while pending and (wait or pending[0].event is None or pending[0].event.query()):
            if pending[0].event is not None:
                pending[0].event.synchronize()
            flusher.send(pending.popleft().message)
