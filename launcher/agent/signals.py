"""Stop signals as a flag, and processes that do not outlive their parent. Standard library only.

Ctrl-C, SIGTERM and SIGUSR2 (what a scheduler sends ahead of its limit; NCCL may catch SIGUSR1) and a closed
terminal all mean: finish the step, save, exit 75. One process may get the same signal from several senders,
so a handler only sets a flag and never counts.
"""

from __future__ import annotations

import ctypes
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2, signal.SIGHUP)
_PR_SET_PDEATHSIG = 1

Handler = Callable[[int, FrameType | None], None]


class StopFlag:
    """`requested` turns true at the first stop signal and stays so."""

    __slots__ = ("requested",)

    def __init__(self) -> None:
        self.requested = False

    def __call__(self, signum: int, frame: FrameType | None) -> None:
        self.requested = True


def on_stop_signals(handler: Handler) -> None:
    """Call `handler` for every stop signal. A SIGHUP ignored from outside (nohup) stays ignored."""
    for number in STOP_SIGNALS:
        if number is signal.SIGHUP and signal.getsignal(number) is signal.SIG_IGN:
            continue
        signal.signal(number, handler)


@contextmanager
def stop_signals_deferred() -> Iterator[None]:
    """Stop signals that arrive inside are delivered at its end; a process forked inside starts with them blocked."""
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        yield
    finally:
        release_stop_signals()


@contextmanager
def stop_signals_kept() -> Iterator[None]:
    """Restore the handlers of stop signals on leaving; inside, other handlers may be installed."""
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def release_stop_signals() -> None:
    """Deliver the stop signals held since the fork: called once the process has its own handlers."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)


def die_with_parent(parent_pid: int) -> None:
    """Have the kernel kill this process when its parent is gone, however it went. Linux; a no-op elsewhere.

    The parent may have died before the request: then this process ends at once.
    """
    try:
        libc = ctypes.CDLL(None, use_errno=True)
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    except (OSError, AttributeError):
        return
    if os.getppid() != parent_pid:
        os.kill(os.getpid(), signal.SIGKILL)


def describe_exit(code: int | None) -> str:
    """`exited with code 3`, `was killed by signal 9 (SIGKILL)`."""
    if code is None:
        return "did not end"
    if code >= 0:
        return f"exited with code {code}"
    try:
        name = signal.Signals(-code).name
    except ValueError:
        name = "unknown"
    return f"was killed by signal {-code} ({name})"
