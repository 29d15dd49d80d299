"""Follows one metric over a run's evaluations: which checkpoint is the best, and when there is nothing more to wait for. Pure."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from .config import is_better_higher


@dataclass(frozen=True, slots=True)
class Best:
    """The best evaluation so far of one metric."""

    metric: str
    value: float | None = None
    step: int | None = None
    """None: no evaluation gave a number yet."""
    worse: int = 0
    """Evaluations in a row since then."""

    def add(self, step: int, metrics: Mapping[str, float | None]) -> Best:
        """What it is after the evaluation of `step`. A number that is none, or not finite, is no improvement."""
        value = metrics.get(self.metric)
        if value is None or not math.isfinite(value) or (self.value is not None and not self._improves(value, self.value)):
            return replace(self, worse=self.worse + 1)
        return Best(self.metric, value, step)

    def _improves(self, value: float, best: float) -> bool:
        return value > best if is_better_higher(self.metric) else value < best

    def ends(self, patience: int | None) -> bool:
        """Whether `patience` evaluations in a row were no better."""
        return patience is not None and self.worse >= patience

    def dump(self) -> dict[str, Any]:
        """It as JSON, for checkpoints."""
        return asdict(self)


def load_best(metric: str | None, saved: Mapping[str, Any] | None) -> Best | None:
    """What a checkpoint `saved`; begun anew for another metric than it followed; None where none is followed."""
    if metric is None:
        return None
    return Best(**saved) if saved is not None and saved["metric"] == metric else Best(metric)
