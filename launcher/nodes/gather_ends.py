"""Lets the agents of several nodes end together once ranks of one have failed, through the store they share."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch.distributed import TCPStore

_POLL_S = 0.1
_NOTICE_S = 30.0
"""Seconds an agent may take to see that ranks elsewhere have failed: it looks ten times a second, but its machine or disk may stand still.

Given up too early, it is killed before it has reported, and a healthy node is called lost. Too late costs nothing but this wait.
"""
_END_S = 60.0
"""Seconds it may take from there on to end its own ranks and to write down what became of them."""


class Ends:
    """Counters in the store: which agents failed, are ending, have ended. A store that is gone took the head with it, and ends all.

    They are counted, not listed: with hundreds of nodes a look costs the head as little as with two.
    """

    def __init__(self, store: TCPStore, num_nodes: int, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._store, self._num_nodes, self._clock = store, num_nodes, clock
        self._ending_since: float | None = None
        self._has_failed = False

    def report_failed(self) -> None:
        """Have the agents of all other nodes end their ranks."""
        if not self._has_failed:
            self._has_failed = True
            self._count("failed", 1)
            self._report_ending()

    def failed_elsewhere(self) -> bool:
        """Return whether another agent reported a failure, or is gone with the store."""
        has_failed = self._count("failed") != 0
        if has_failed:
            self._report_ending()
        return has_failed

    def wait_for_others(self) -> None:
        """Wait, after a failure and this agent's own report, until all agents that live have written theirs.

        An agent that was cut off never says that it is ending; it is waited for no longer than noticing may take.
        """
        since = self._report_ending()
        self._count("ended", 1)
        while (ended := self._count("ended")) is not None and ended < self._num_nodes:
            passed = self._clock() - since
            if passed > _END_S or (passed > _NOTICE_S and ended >= (self._count("ending") or 0)):
                return
            time.sleep(_POLL_S)

    def _report_ending(self) -> float:
        """Have the others know that this agent lives; returns since when they do."""
        if self._ending_since is None:
            self._ending_since = self._clock()
            self._count("ending", 1)
        return self._ending_since

    def _count(self, word: str, more: int = 0) -> int | None:
        """Return how many agents counted under `word`, adding `more`; None where the store is gone, which the others see by themselves."""
        from torch.distributed import DistError

        try:
            return int(self._store.add(f"ends/{word}", more))
        except DistError:
            return None
