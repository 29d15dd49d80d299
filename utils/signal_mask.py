"""Starting processes beside a rank that a scheduler's stop signal is not meant for, but reaches: SLURM signals every one of a step."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP)


@contextmanager
def stop_signals_blocked() -> Iterator[None]:
    """A process started inside cannot be ended by stop signals before it installs its handlers: see `ignore_stop_signals`.

    Without it the signal that asks for a save would kill the process that is about to write it, if it has just been
    started. The mask is this thread's, and what arrives for it inside is delivered at the end.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def ignore_stop_signals() -> None:
    """Ignore stop signals, also those that have come already; for the first line of such a process."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
