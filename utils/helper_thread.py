"""Threads that work for a process behind its main thread: one that dies ends the process, with its reason on record."""

from __future__ import annotations

import os
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class HelperThread(threading.Thread):
    """A daemon thread that has to live until its work is done. An exception that leaves it goes to `ends_with_helpers`."""

    def __init__(self, work: Callable[[], None], name: str) -> None:
        super().__init__(target=work, name=name, daemon=True)
        self.is_ending = False
        """Whether it was told to finish: a process that ends gives it some time."""

    def run(self) -> None:
        try:
            super().run()
        except SystemExit as error:
            # Python ends such a thread without a word.
            raise RuntimeError(f"the thread {self.name} asked for exit code {error.code}") from error


class HelperDiedError(Exception):
    """A HelperThread ended by an exception, which is the cause of this one."""

    def __init__(self, name: str, cause: BaseException) -> None:
        super().__init__(f"the helper thread `{name}` ended: {type(cause).__name__}: {cause}")
        self.__cause__ = cause


def await_ending(limit_s: float) -> None:
    """Wait for the helper threads of this process that are ending, `limit_s` at most in all."""
    deadline = time.monotonic() + limit_s
    for thread in threading.enumerate():
        if isinstance(thread, HelperThread) and thread.is_ending:
            thread.join(max(0.0, deadline - time.monotonic()))


@contextmanager
def ends_with_helpers(record: Callable[[HelperDiedError], int]) -> Iterator[None]:
    """Inside, a HelperThread of this process that dies ends it at once, with the exit code that `record` returns.

    The main thread may be waiting for that very thread, in a call that no exception reaches.
    """
    before = threading.excepthook

    def on_death(arguments: threading.ExceptHookArgs) -> None:
        if not isinstance(arguments.thread, HelperThread) or arguments.exc_value is None:
            before(arguments)
            return
        try:
            code = record(HelperDiedError(arguments.thread.name, arguments.exc_value))
        except BaseException:  # what cannot be recorded still ends the process
            traceback.print_exc()
            code = 1
        os._exit(code)

    threading.excepthook = on_death
    try:
        yield
    finally:
        threading.excepthook = before


def print_death(error: HelperDiedError) -> int:
    """Print the reason to standard error and return exit code 1, in processes whose parent notices their end."""
    traceback.print_exception(error)
    return 1
