"""Tokenises in several processes, with results in the order of the batches.

Each worker has one pipe and at most one batch at a time, so neither side ever blocks on a full pipe. A worker whose
parent is gone, however it died, reads end-of-file from its pipe and exits.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import traceback
from collections import deque
from collections.abc import Iterator
from multiprocessing.connection import Connection
from typing import Any

from ...errors import EfflaunchError
from .encode import Encoded, EncodeOptions, Encoder
from .inputs import RawBatch


def encode_all(batches: Iterator[RawBatch], options: EncodeOptions, num_workers: int) -> Iterator[tuple[RawBatch, Encoded]]:
    """Yields each batch with its result, in order. With one worker the work is done here, without a process."""
    if num_workers == 1:
        encoder = Encoder(options)
        for batch in batches:
            yield batch, encoder.encode(batch)
        return
    pool = _Pool(options, num_workers)
    try:
        yield from pool.run(batches)
    finally:
        pool.close()


class _Pool:
    def __init__(self, options: EncodeOptions, num_workers: int) -> None:
        # Spawned, not forked: the tokenizer library's own threads do not survive a fork.
        context = multiprocessing.get_context("spawn")
        self._workers: list[tuple[Any, Connection]] = []
        for _ in range(num_workers):
            ours, theirs = context.Pipe()
            process = context.Process(target=_work, args=(theirs, options), daemon=True)
            process.start()
            theirs.close()
            self._workers.append((process, ours))

    def run(self, batches: Iterator[RawBatch]) -> Iterator[tuple[RawBatch, Encoded]]:
        waiting: deque[tuple[RawBatch, Connection]] = deque()
        for _, pipe in self._workers:
            self._send(batches, pipe, waiting)
        while waiting:
            batch, pipe = waiting.popleft()
            answer = self._receive(pipe)
            self._send(batches, pipe, waiting)
            yield batch, answer

    def _send(self, batches: Iterator[RawBatch], pipe: Connection, waiting: deque[tuple[RawBatch, Connection]]) -> None:
        batch = next(batches, None)
        if batch is not None:
            pipe.send(batch)
            waiting.append((batch, pipe))

    def _receive(self, pipe: Connection) -> Encoded:
        try:
            answer = pipe.recv()
        except EOFError as error:
            raise EfflaunchError("a tokenising worker died (out of memory?); run the same command again to resume") from error
        if isinstance(answer, Encoded):
            return answer
        if isinstance(answer, BaseException):
            raise answer
        raise EfflaunchError(f"a tokenising worker failed:\n{answer}")

    def close(self) -> None:
        for process, pipe in self._workers:
            pipe.close()
            process.terminate()
            process.join()


def _work(pipe: Connection, options: EncodeOptions) -> None:
    # Ctrl-C reaches every process of the terminal; the parent decides and closes the pipe.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one process per core already
    encoder: Encoder | None = None
    while True:
        try:
            batch = pipe.recv()
        except (EOFError, OSError):
            return
        try:
            encoder = encoder or Encoder(options)
            answer: object = encoder.encode(batch)
        except EfflaunchError as error:
            answer = error
        except Exception:
            answer = traceback.format_exc()
        try:
            pipe.send(answer)
        except OSError:
            return
