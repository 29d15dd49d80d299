"""How the agents of several nodes look at a hang together: through the store they share anyway."""

from __future__ import annotations

import json
import time
from datetime import timedelta
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch.distributed import TCPStore

_POLL_S = 1.0
_ANSWER_S = 90.0
"""How long agents wait for each other's answers: writing stacks takes some seconds, py-spy longer."""


class StoreOthers:
    """hang.Others over a torch store. A store that is gone took the head with it, and the agents notice that by themselves."""

    def __init__(self, store: TCPStore, node: int, num_nodes: int) -> None:
        self._store, self._node, self._num_nodes = store, node, num_nodes
        self._polled = 0.0

    def asked(self) -> bool:
        if time.monotonic() - self._polled < _POLL_S:
            return False
        self._polled = time.monotonic()
        try:
            return bool(self._store.check(["hang/asked"]))
        except _dist_error():
            return False

    def ask(self) -> None:
        try:
            self._store.set("hang/asked", str(self._node))
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
