"""Decides whether copying behind the step slows it, and what to do then. Pure decisions over measured times."""

from __future__ import annotations

import statistics
from collections import deque
from dataclasses import dataclass, field
from enum import Enum

_MANY, _FEW = 20, 5
_SPREAD_OVER = 0.8
"""Share of a step over which copies are spread."""


class Pace(Enum):
    """How a snapshot is copied."""

    LAZY = "lazy"
    """Copies as fast as it goes, behind forward and backward."""
    SPREAD = "spread"
    """Copies behind them, with pauses."""
    EAGER = "eager"
    """Copies inside save(): training waits for it and is not disturbed."""


def next_pace(pace: Pace, *, without_s: float, with_s: float, copy_s: float, max_slowdown: float) -> Pace:
    """The pace of the next snapshot, from steps without and with copies behind them and the time of one copy."""
    extra_s = with_s - without_s
    if extra_s <= max_slowdown * without_s:
        return pace
    if pace is Pace.LAZY and copy_s < _SPREAD_OVER * without_s:
        return Pace.SPREAD
    # Waiting for the copy must cost less than what it costs now.
    return Pace.EAGER if copy_s < extra_s else pace


@dataclass(slots=True)
class Throttle:
    """The times of recent steps. `reason` says what the newest change was for."""

    max_slowdown: float
    pace: Pace = Pace.LAZY
    reason: str = ""
    _without: deque[float] = field(default_factory=lambda: deque(maxlen=_MANY))
    _with: deque[float] = field(default_factory=lambda: deque(maxlen=_FEW))

    @property
    def step_s(self) -> float:
        """Seconds of a step; 0 before the first."""
        return statistics.median(self._without or self._with or [0.0])

    def add(self, step_s: float, copy_s: float | None) -> bool:
        """Add a step's time without its wait for a snapshot; `copy_s`: of the copy behind it. True where the pace changed."""
        (self._without if copy_s is None else self._with).append(step_s)
        if copy_s is None or len(self._with) < _FEW or len(self._without) < _FEW:
            return False
        without_s, with_s = statistics.median(self._without), statistics.median(self._with)
        pace = next_pace(self.pace, without_s=without_s, with_s=with_s, copy_s=copy_s, max_slowdown=self.max_slowdown)
        if pace is self.pace:
            return False
        self.reason = f"steps with a copy behind them take {with_s / without_s - 1:.1%} longer: {pace.value} copies from now on"
        self.pace = pace
        self._with.clear()
        return True

    def delay_s(self, copy_s: float, num_chunks: int) -> float:
        """Pause after each chunk of a snapshot."""
        if self.pace is not Pace.SPREAD or not num_chunks:
            return 0.0
        return max(0.0, _SPREAD_OVER * self.step_s - copy_s) / num_chunks
