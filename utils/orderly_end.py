"""Closes what a block used where the block ends well, and leaves it alone where an error leaves the block.

An error must be on record before anything is waited for: other ranks may sit in a collective that this one will never join, and a
back end, a stream or a thread that is shut down then waits with them. The process that has failed ends at once instead
(launcher/agent/worker.py), and what it held goes with it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def closed_in_order(close: Callable[[], object]) -> Iterator[None]:
    """Call `close` at the end of the block, unless an exception ends it."""
    yield
    close()
