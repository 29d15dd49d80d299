"""Standard output and error that never end a run: what cannot be shown is lost, said elsewhere, and training continues.

Note: three kinds of streams. `plain_output` is for every command: what is printed has no terminal escapes of its own.
`steady_output` is for commands that start or follow a run: a thread of each stream writes, so a reader that is slow or
stopped delays nobody, and one that is gone raises nothing. `lenient_output` is for agents and ranks, whose output goes to
files: a full disk loses lines and nothing else.
"""

from __future__ import annotations

import errno
import io
import os
import select
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, TextIO, cast

from ..errors import EfflaunchError
from ..utils.text import plain

STREAMS = {"stdout": "standard output", "stderr": "standard error"}
MAX_PENDING = 1 << 20
"""Bytes kept for a reader that does not read; what comes on top is not shown."""
STUCK_S = 10.0
"""A reader that took nothing for so long is said not to read."""
PATIENCE_S = 5.0
"""Seconds the end of a command waits for a reader that takes nothing."""
_ORDER_S = 0.5
_SLICE = 4096
_GONE = (errno.EPIPE, errno.EIO, errno.EBADF, errno.ENXIO, errno.ENODEV)


class LenientFile(io.RawIOBase):
    """An open file descriptor to write to: `write` never raises. What cannot be written is lost, and counted in `lost`."""

    def __init__(self, fd: int, name: str) -> None:
        super().__init__()
        self.name, self.lost = name, 0
        self.trouble: str | None = None
        """Why output was lost for the first time; None: nothing was."""
        self._fd = fd

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self._fd

    def isatty(self) -> bool:
        return os.isatty(self._fd)

    def write(self, data: Any) -> int:
        text = bytes(data)
        self._put(text)
        return len(text)

    def _put(self, data: bytes) -> None:
        try:
            _write_all(self._fd, data)
        except OSError as error:
            self._lose(len(data), f"cannot be written ({os.strerror(error.errno or 0)})")

    def _lose(self, num_bytes: int, why: str) -> None:
        self.lost += num_bytes
        self.trouble = self.trouble or f"{self.name} {why}"


class BackgroundFile(LenientFile):
    """A lenient file that a thread writes: `write` never waits either."""

    def __init__(self, fd: int, name: str) -> None:
        super().__init__(fd, name)
        self.is_gone = False
        self.before: BackgroundFile | None = None
        """Another stream of the same terminal, whose earlier lines should come first."""
        self._pending: deque[bytes] = deque()
        self._num_pending, self._moved, self._is_ending = 0, time.monotonic(), False
        self._changed, self._pid = threading.Condition(), os.getpid()
        threading.Thread(target=self._run, name=f"{name} writer", daemon=True).start()

    def _put(self, data: bytes) -> None:
        if os.getpid() != self._pid:
            # Forked: the thread is the parent's, and somebody may have held the lock.
            super()._put(data)
            return
        if self.before is not None and not self.before.is_stuck:
            self.before.drain(_ORDER_S)
        with self._changed:
            if self.is_gone:
                self.lost += len(data)
            elif self._num_pending + len(data) > MAX_PENDING:
                self._lose(len(data), "is not read fast enough: lines are left out")
            else:
                if not self._pending:
                    self._moved = time.monotonic()
                self._pending.append(data)
                self._num_pending += len(data)
                self._changed.notify_all()

    @property
    def is_stuck(self) -> bool:
        """Return whether output waits that nobody has read for a while."""
        return self._num_pending > 0 and time.monotonic() - self._moved > _ORDER_S

    def look(self) -> None:
        """Note a reader that takes nothing any more; call it now and then."""
        if self._num_pending and time.monotonic() - self._moved > STUCK_S:
            self._lose(0, f"has not been read for {STUCK_S:.0f} s")

    def drain(self, patience_s: float) -> bool:
        """Wait until everything is written; False where nothing moved for `patience_s`."""
        with self._changed:
            while self._num_pending and not self.is_gone:
                left_s = self._moved + patience_s - time.monotonic()
                if left_s <= 0:
                    return False
                self._changed.wait(left_s)
        return True

    def end(self) -> None:
        """The thread ends once everything is written."""
        with self._changed:
            self._is_ending = True
            self._changed.notify_all()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._pending or self._is_ending)
                if not self._pending:
                    return
                data = self._pending[0]
            self._write_slowly(data)
            with self._changed:
                self._pending.popleft()
                self._num_pending -= len(data)
                self._changed.notify_all()

    def _write_slowly(self, data: bytes) -> None:
        """Write in slices, so that a slow reader is distinguished from a stopped one."""
        for start in range(0, len(data), _SLICE):
            try:
                _write_all(self._fd, data[start : start + _SLICE])
            except OSError as error:
                self.is_gone = self.is_gone or error.errno in _GONE
                why = "is gone" if self.is_gone else "cannot be written"
                self._lose(len(data) - start, f"{why} ({os.strerror(error.errno or 0)})")
                return
            self._moved = time.monotonic()


def _write_all(fd: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        try:
            view = view[os.write(fd, view) :]
        except BlockingIOError:
            # Somebody else made the file non-blocking; it is theirs as well.
            select.select([], [fd], [])


class SteadyOutput:
    """The streams of a command that must not end with them, and what became of each."""

    def __init__(self, files: list[BackgroundFile], closed: list[str]) -> None:
        self.files = files
        self._news = [f"{name} was closed when efflaunch started" for name in closed]
        self._announced: set[str] = set()

    def news(self) -> list[str]:
        """Troubles since the last call, a sentence each; every stream is reported once."""
        for file in self.files:
            file.look()
            if file.trouble is not None and file.name not in self._announced:
                self._announced.add(file.name)
                self._news.append(file.trouble)
        news, self._news = self._news, []
        return news

    def drain(self) -> None:
        """Have what was printed written, as far as somebody reads it."""
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        for file in self.files:
            if not file.drain(PATIENCE_S):
                file._lose(0, f"was not read for {PATIENCE_S:.0f} s: its end is not shown")


class PlainText:
    """A text stream in front of another: print() through it, and no file's contents reach a terminal as commands."""

    def __init__(self, stream: TextIO, steady: SteadyOutput | None = None) -> None:
        self.stream, self.steady = stream, steady
        self.rich_proxied_file = stream
        """Stream to which rich, which makes escapes of its own, writes instead."""

    def write(self, text: str) -> int:
        try:
            return self.stream.write(plain(text))
        except OSError as error:
            raise _unprintable(error) from error

    def flush(self) -> None:
        try:
            self.stream.flush()
        except OSError as error:
            raise _unprintable(error) from error

    def writelines(self, lines: Iterable[str]) -> None:
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


class OutputError(EfflaunchError):
    """Raised where the result of a command cannot be written."""


def _unprintable(error: OSError) -> Exception:
    # A reader that is gone (`| head`) has what it wanted: that is no error of ours.
    return error if isinstance(error, BrokenPipeError) else OutputError(f"what it prints cannot be written: {error.strerror}")


class _ClosedText(io.TextIOWrapper):
    """Stands in for a stream that was closed before the process began."""


def open_closed_streams() -> None:
    """Give descriptors 0, 1 and 2 to /dev/null where they are closed: the next file opened would become standard output."""
    for fd, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(fd)
        except OSError:
            # The lowest free descriptor, so this one.
            os.open(os.devnull, os.O_RDONLY if fd == 0 else os.O_WRONLY)
        if getattr(sys, name) is None:
            file = io.BufferedReader(io.FileIO(fd, "r", closefd=False)) if fd == 0 else io.BufferedWriter(io.FileIO(fd, "w", closefd=False))
            setattr(sys, name, _ClosedText(file, encoding="utf-8", errors="backslashreplace"))


@contextmanager
def plain_output() -> Iterator[None]:
    """Inside, what print() writes has no control characters, and none that the terminal's character set lacks raises."""
    before = sys.stdout, sys.stderr
    for stream in before:
        reconfigure = getattr(stream, "reconfigure", None)
        if reconfigure is not None and stream.errors in ("strict", "surrogateescape"):
            reconfigure(errors="backslashreplace")
    sys.stdout, sys.stderr = (cast(TextIO, PlainText(stream)) for stream in before)
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before


@contextmanager
def steady_output() -> Iterator[SteadyOutput]:
    """Inside, printing neither raises nor waits. One inside another is the same. Streams without a descriptor stay as they are."""
    current = getattr(sys.stdout, "steady", None)
    if current is not None:
        yield current
        return
    before = {name: getattr(sys, name) for name in STREAMS}
    files: dict[str, BackgroundFile] = {}
    for name, stream in before.items():
        fd = _descriptor(stream)
        if fd is not None:
            files[name] = BackgroundFile(fd, STREAMS[name])
    closed = [STREAMS[name] for name, stream in before.items() if isinstance(getattr(stream, "stream", stream), _ClosedText)]
    steady = SteadyOutput(list(files.values()), closed)
    for name, file in files.items():
        file.before = next((other for other in files.values() if other is not file), None)
        setattr(sys, name, PlainText(_text_over(file, getattr(before[name], "encoding", None)), steady))
    try:
        with _background_writes_allowed():
            try:
                yield steady
            finally:
                steady.drain()
    finally:
        for name, stream in before.items():
            setattr(sys, name, stream)
        for file in files.values():
            file.end()


@contextmanager
def _background_writes_allowed() -> Iterator[None]:
    """A terminal with `stty tostop` stops background processes that write, unless they ignore that."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTTOU, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGTTOU, before)


def _descriptor(stream: TextIO) -> int | None:
    """Return the descriptor of a stream, flushed; None where it has none, as within tests."""
    try:
        fd = stream.fileno()
        stream.flush()
    except OSError as error:
        # Also io.UnsupportedOperation. One that is full or gone already has a descriptor.
        return None if isinstance(error, io.UnsupportedOperation) else stream.fileno()
    except (AttributeError, ValueError):
        return None
    return fd


def _text_over(file: LenientFile, encoding: str | None) -> TextIO:
    return io.TextIOWrapper(io.BufferedWriter(file), encoding=encoding or "utf-8", errors="backslashreplace", line_buffering=True)


def lenient_text(fd: int, name: str) -> TextIO:
    """Lines to a descriptor, which is not closed: what a full disk does not take is lost."""
    return _text_over(LenientFile(fd, name), "utf-8")


def lenient_output(*names: str) -> None:
    """Make a full disk under standard output or error lose lines from here on and raise nothing: for agents and ranks."""
    open_closed_streams()
    for name in names or STREAMS:
        with suppress(OSError):
            getattr(sys, name).flush()
        setattr(sys, name, lenient_text(1 if name == "stdout" else 2, STREAMS[name]))


@contextmanager
def lenient_file(path: os.PathLike[str]) -> Iterator[Callable[[str], None]]:
    """A function that appends a line to a file; one that cannot be written is lost. OSError where it cannot be opened."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    try:
        stream = lenient_text(fd, str(path))
        yield lambda line: print(line, file=stream, flush=True)
    finally:
        os.close(fd)


def finish_output(code: int) -> int:
    """Write what print() holds back; the exit code, which is 1 in place of 0 where that cannot be shown. For the end of a command."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        _drop(1)
    except OutputError as error:
        code = code or drop_output(error)
    try:
        sys.stderr.flush()
    except (OutputError, OSError):
        _drop(2)
    return code


def drop_output(error: OutputError) -> int:
    """Say that standard output cannot be written, and write no more to it; the exit code."""
    _drop(1)
    complain(str(error))
    return error.exit_code


def complain(text: str) -> None:
    """`efflaunch: ...` on standard error, if there is anybody to read it."""
    try:
        print(f"efflaunch: {text}", file=sys.stderr, flush=True)
    except (OutputError, OSError):
        _drop(2)


def _drop(fd: int) -> None:
    """Write nothing more to the descriptor: the interpreter would try once more at its end, and exit with 120."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, fd)
    os.close(null)
