"""Lets the agents of several nodes look at a hang together, through the store they share anyway."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from datetime import timedelta
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch.distributed import TCPStore

_POLL_S = 1.0
_ANSWER_S = 90.0
"""Seconds agents wait for each other's answers: writing stacks takes some seconds, py-spy longer."""


class StoreOthers:
    """hang.Others over a torch store. A store that is gone took the head with it, and the agents notice that by themselves."""

    def __init__(self, store: TCPStore, node: int, num_nodes: int, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._store, self._node, self._num_nodes, self._clock = store, node, num_nodes, clock
        self._looked = -math.inf

    def asked(self) -> bool:
        if self._clock() - self._looked < _POLL_S:
            return False
        self._looked = self._clock()
        try:
            return bool(self._store.check(["hang/asked"]))
        except _dist_error():
            return False

    def ask(self) -> None:
        try:
            # Counted, not set: only this is answered, and so seen by whoever looks from now on.
            self._store.add("hang/asked", 1)
        except _dist_error():
            pass

    def exchange(self, mine: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], list[int]]:
        deadline = time.monotonic() + _ANSWER_S
        answers = {self._node: mine}
        try:
            self._store.set(f"hang/answer-{self._node}", json.dumps(mine))
        except _dist_error():
            pass
        for node in range(self._num_nodes):
            answer = mine if node == self._node else self._wait(f"hang/answer-{node}", deadline)
            if answer is not None:
                answers[node] = answer
        self._part(list(answers), deadline)
        return [row for rows in answers.values() for row in rows], [node for node in range(self._num_nodes) if node not in answers]

    def _part(self, answered: list[int], deadline: float) -> None:
        """The store ends with the head, so it stays until the others have read."""
        try:
            self._store.set(f"hang/heard-{self._node}", "true")
        except _dist_error():
            return
        if self._node == 0:
            for node in answered:
                self._wait(f"hang/heard-{node}", deadline)

    def _wait(self, key: str, deadline: float) -> Any:
        try:
            self._store.wait([key], timedelta(seconds=max(0.1, deadline - time.monotonic())))
            return json.loads(self._store.get(key))
        except _dist_error():
            return None


def _dist_error() -> type[Exception]:
    from torch.distributed import DistError

    return DistError
