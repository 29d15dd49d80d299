"""How the agents of several nodes end together once ranks of one of them have failed: through the store they share."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch.distributed import TCPStore

_POLL_S = 0.1
_NOTICE_S = 5.0
"""How long an agent may take to see that ranks elsewhere have failed."""
_END_S = 30.0
"""How long it may take from there on to end its own and to write down what became of them."""


class Ends:
    """What this agent and the others say of their ends. A store that is gone took the head with it, and ends all."""

    def __init__(self, store: TCPStore, node: int, num_nodes: int) -> None:
        self._store, self._node, self._nodes = store, node, range(num_nodes)
        self._ending_since: float | None = None
        self._has_failed = False

    def tell_failed(self) -> None:
        """Have the agents of all other nodes end their ranks."""
        if not self._has_failed:
            self._has_failed = True
            self._say("failed")
            self._say_ending()

    def failed_elsewhere(self) -> bool:
        """Whether another agent told so, or is gone with the store."""
        has_failed = self._said("failed", if_gone=True)
        if has_failed:
            self._say_ending()
        return has_failed

    def wait_for_others(self) -> None:
        """After a failure, and after this agent's report: until all agents that live have written theirs.

        An agent that was cut off never says that it is ending; it is waited for no longer than noticing may take.
        """
        since = self._say_ending()
        self._say(f"ended-{self._node}")
        while not self._said(*(f"ended-{node}" for node in self._nodes), if_gone=True):
            passed = time.monotonic() - since
            if passed > _END_S or (passed > _NOTICE_S and not any(map(self._is_ending, self._nodes))):
                return
            time.sleep(_POLL_S)

    def _is_ending(self, node: int) -> bool:
        """Whether it said that it lives, and not yet that its report is there."""
        return self._said(f"ending-{node}", if_gone=False) and not self._said(f"ended-{node}", if_gone=True)

    def _say_ending(self) -> float:
        """Have the others know that this agent lives; returns since when they do."""
        if self._ending_since is None:
            self._ending_since = time.monotonic()
            self._say(f"ending-{self._node}")
        return self._ending_since

    def _say(self, word: str) -> None:
        from torch.distributed import DistError

        try:
            self._store.set(f"ends/{word}", "true")
        except DistError:
            # The head is gone, and the others see that by themselves.
            pass

    def _said(self, *words: str, if_gone: bool) -> bool:
        from torch.distributed import DistError

        try:
            return bool(self._store.check([f"ends/{word}" for word in words]))
        except DistError:
            return if_gone
