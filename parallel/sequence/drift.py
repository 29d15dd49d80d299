"""How far measured times drift from the cost model, per group degree, and what the model would be if it followed them. No torch.

Every group of a step gives one equation per degree: m_a x (its modelled attention seconds) + m_l x (its modelled linear
seconds) = measured seconds. The multipliers m are fitted by least squares on relative errors, old equations fading, and held to 1
by a prior worth PRIOR groups: few measurements move them little.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from .cost import CostModel, DegreeCost

THRESHOLD = 1.25
"""Measured over modelled seconds beyond which a degree has drifted, up or down."""
ENOUGH = 16
"""Groups of a degree before anything is said of it."""
PRIOR = 1.0
LIMIT = 8.0
"""In the refit one group counts as at most so many times slower or faster than modelled: a rank that was stopped is no evidence."""
FADE = 0.995
"""Weight of an equation after one more of its degree: the last few hundred groups count."""


@dataclass(slots=True)
class Observed:
    """Groups of one degree: normal equations of the two multipliers, and how the predictions did."""

    groups: int = 0
    weight: float = 0.0
    log_ratio: float = 0.0
    """Faded sum of log(measured / modelled)."""
    error: float = 0.0
    """Faded sum of |modelled / measured - 1|."""
    products: list[float] = field(default_factory=lambda: [0.0] * 5)
    """aa, al, ll, a, l: faded sums, of attention and linear seconds over measured seconds."""

    def add(self, attention_s: float, linear_s: float, measured_s: float) -> None:
        modelled_s = attention_s + linear_s
        self.groups += 1
        self.weight = self.weight * FADE + 1
        self.log_ratio = self.log_ratio * FADE + math.log(measured_s / modelled_s)
        self.error = self.error * FADE + abs(modelled_s / measured_s - 1)
        measured_s = min(max(measured_s, modelled_s / LIMIT), modelled_s * LIMIT)
        a, linear = attention_s / measured_s, linear_s / measured_s
        new = (a * a, a * linear, linear * linear, a, linear)
        self.products = [old * FADE + value for old, value in zip(self.products, new, strict=True)]

    @property
    def ratio(self) -> float:
        """Measured over modelled seconds, the geometric mean."""
        return math.exp(self.log_ratio / self.weight) if self.weight else 1.0

    @property
    def mean_error(self) -> float:
        return self.error / self.weight if self.weight else 0.0

    @property
    def has_drifted(self) -> bool:
        return self.groups >= ENOUGH and abs(math.log(self.ratio)) > math.log(THRESHOLD)

    def multipliers(self) -> tuple[float, float]:
        """Multipliers of attention and linear seconds, never below a tenth."""
        aa, al, ll, a, linear = self.products
        p, q, r = aa + PRIOR, al, ll + PRIOR
        det = p * r - q * q
        first, second = (r * (a + PRIOR) - q * (linear + PRIOR)) / det, (p * (linear + PRIOR) - q * (a + PRIOR)) / det
        return max(0.1, first), max(0.1, second)


class Drift:
    """Everything measured against one cost model."""

    def __init__(self, cost: CostModel) -> None:
        self.cost = cost
        self.by_degree: dict[int, Observed] = {}
        self._reported: set[int] = set()

    def add(self, lengths: Sequence[int], degree: int, measured_s: float) -> None:
        """A group held sequences of these lengths for so long."""
        if measured_s <= 0 or not lengths:
            return
        modelled = self.cost.of(degree)
        linear_s = sum(lengths) * (modelled.linear_s + modelled.exchange_s)
        total_s = self.cost.group_s(lengths, degree)
        self.by_degree.setdefault(degree, Observed()).add(total_s - linear_s, linear_s, measured_s)

    def news(self) -> dict[int, float]:
        """Degrees that have drifted since the last call, with measured over modelled time; each is reported once until it is back."""
        drifted = {degree for degree, seen in self.by_degree.items() if seen.has_drifted}
        fresh, self._reported = drifted - self._reported, drifted
        return {degree: self.by_degree[degree].ratio for degree in sorted(fresh)}

    def refitted(self) -> CostModel:
        """The cost model that follows the measurements."""
        degrees = tuple(self._refitted(modelled) for modelled in self.cost.degrees)
        return replace(self.cost, degrees=degrees, source="profile")

    def _refitted(self, modelled: DegreeCost) -> DegreeCost:
        seen = self.by_degree.get(modelled.degree)
        if seen is None:
            return modelled
        attention, linear = seen.multipliers()
        return replace(
            modelled,
            attention_s=modelled.attention_s * attention,
            windowed_s=tuple((window, pair_s * attention) for window, pair_s in modelled.windowed_s),
            linear_s=modelled.linear_s * linear,
            exchange_s=modelled.exchange_s * linear,
            ring_s=modelled.ring_s * attention,
        )

    def dump(self) -> dict[str, Any]:
        """The monitor's state as JSON, for checkpoints."""
        return {str(d): [s.groups, s.weight, s.log_ratio, s.error, *s.products] for d, s in self.by_degree.items()}

    def load(self, data: dict[str, Any]) -> None:
        """Resume from `dump` of a run with the same cost model."""
        for degree, (groups, weight, log_ratio, error, *products) in data.items():
            self.by_degree[int(degree)] = Observed(int(groups), weight, log_ratio, error, list(products))
