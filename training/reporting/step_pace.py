"""Predicts a step's duration, for those that judge whether it still moves. No torch."""

from __future__ import annotations

import statistics
from collections import deque

RECENT = 32
"""Steps whose median counts."""


class Pace:
    """The plan's prediction, or the median of the newest steps where that is more."""

    def __init__(self) -> None:
        self._measured: deque[float] = deque(maxlen=RECENT)

    def add(self, step_s: float) -> None:
        """Count a finished step."""
        self._measured.append(step_s)

    def expected_s(self, predicted_s: float | None = None) -> float:
        """Expected seconds of a step; zero where nothing is known."""
        return max(predicted_s or 0.0, statistics.median(self._measured) if self._measured else 0.0)
