"""A clock for hang watches in tests: time passes only while every rank of the node is at rest, however busy the machine is.

A rank that waits for a processor is runnable, not asleep, so a slow one never counts as silent; and nobody waits for a real limit.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from efflaunch.launcher.agent import hang_watch as hang

_AT_REST = ("S", "T", "t", "Z")
_STEP_S = 1.0
_LOOKS = 10
"""So many looks in a row find nothing that runs before time passes: a collective's answer is on its way for less."""


class RestClock:
    """Seconds, for one attempt."""

    def __init__(self) -> None:
        self.now_s, self._looks = 0.0, 0

    def __call__(self) -> float:
        return self.now_s

    def look(self, pids: Iterable[int]) -> None:
        """Time passes if these have been at rest for a while."""
        self._looks = self._looks + 1 if all(map(is_at_rest, pids)) else 0
        if self._looks > _LOOKS:
            self.now_s += _STEP_S


def is_at_rest(pid: int) -> bool:
    """Whether no thread of the process runs, wants to run, or waits for a disk."""
    try:
        states = [(task / "stat").read_text().rpartition(")")[2].split()[0] for task in Path(f"/proc/{pid}/task").iterdir()]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return all(state in _AT_REST for state in states)


def install(*, answer_s: float = 120.0) -> None:
    """Every hang watch of this process gets such a clock; ranks that can write their stacks have `answer_s` for it."""
    watch: Any = hang.HangWatch
    begin, look = watch.__init__, watch.look

    def begins(self: Any, *args: Any, **more: Any) -> None:
        self.rest = RestClock()
        begin(self, *args, clock=self.rest, **more)

    def looks(self: Any, pids: Mapping[int, int]) -> Any:
        self.rest.look(pids.values())
        return look(self, pids)

    watch.__init__, watch.look = begins, looks
    hang._ANSWER_S = answer_s
