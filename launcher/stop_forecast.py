"""Forecasts whether a stop will end in time: the rest of a step and a save, against launcher.grace_s. Pure.

A stop signal that comes right after a step began waits for the whole of it; then the state is saved, and the run ends
when that save is durable. What a run has measured of both is the best forecast; before its first checkpoint the ledger's
bytes and cluster.storage_bandwidth, where that is given.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass

from ..units import format_bytes, format_seconds
from .config.run_config import Config
from .rundir.metrics_reader import Event

_RECENT_STEPS = 50
_WORSE = 1.25
"""A reported forecast is reported again once it has grown by as much."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Forecast:
    """Seconds that a stop takes; `source`: what they are derived from."""

    step_s: float
    save_s: float
    grace_s: float
    source: str

    @property
    def needed_s(self) -> float:
        return self.step_s + self.save_s

    @property
    def fits(self) -> bool:
        return self.needed_s <= self.grace_s

    def __str__(self) -> str:
        parts = f"{format_seconds(self.step_s)} for a step and {format_seconds(self.save_s)} for a save ({self.source})"
        if self.fits:
            return f"a stop takes up to {parts}, launcher.grace_s={self.grace_s:g}"
        return f"a stop may not end in time: up to {parts}, launcher.grace_s={self.grace_s:g}; try launcher.grace_s={self.wanted_s}"

    @property
    def wanted_s(self) -> int:
        """A grace time with some room."""
        return math.ceil(1.5 * self.needed_s)


class GraceWatch:
    """Takes in a run's events; `news` once where a stop would not end in time, and again where it gets worse."""

    def __init__(self, grace_s: float) -> None:
        self.grace_s = grace_s
        self.first_s: float | None = None
        """The first step of a start, which also warms up."""
        self.steps: deque[float] = deque(maxlen=_RECENT_STEPS)
        self.save_s: float | None = None
        self.reported_s = 0.0

    def add(self, events: Iterable[Event]) -> GraceWatch:
        """Take in new events, in order; returns itself."""
        for event in events:
            if event["event"] == "start":
                self.first_s = None
                self.steps.clear()
            elif event["event"] == "step" and self.first_s is None:
                self.first_s = float(event["step_s"])
            elif event["event"] == "step":
                self.steps.append(float(event["step_s"]))
            elif event["event"] == "checkpoint" and event.get("save_s") is not None:
                self.save_s = float(event["save_s"])
        return self

    @property
    def forecast(self) -> Forecast | None:
        """Forecast by what was measured; None before the first checkpoint."""
        if self.save_s is None:
            return None
        step_s = max(self.steps, default=self.first_s or 0.0)
        return Forecast(step_s=step_s, save_s=self.save_s, grace_s=self.grace_s, source="measured in this run")

    def news(self) -> str | None:
        """Return a warning that is due now; None where there is none, or nothing new."""
        forecast = self.forecast
        if forecast is None or forecast.fits or forecast.needed_s < _WORSE * self.reported_s:
            return None
        self.reported_s = forecast.needed_s
        return str(forecast)


def measured(events: Iterable[Event], grace_s: float) -> Forecast | None:
    """Forecast a stop by a run's own steps and saves; None before its first checkpoint."""
    return GraceWatch(grace_s).add(events).forecast


def planned(config: Config) -> Forecast | None:
    """Forecast a stop by the ledger and cluster.storage_bandwidth; None where that is not given."""
    bandwidth = config.cluster.storage_bandwidth
    if bandwidth is None:
        return None
    from ..estimate.muon import muon_work
    from .config.ledger import plan

    ledger = plan(config)
    inputs = ledger.inputs
    # Weights as the optimizer keeps them, and its moments; copies of the model are saved once.
    numbers = inputs.parameters * (1 + inputs.residency.state_numbers) - muon_work(inputs).parameters
    num_bytes = int(numbers) * inputs.master
    save_s = num_bytes / (bandwidth * config.cluster.num_nodes)
    source = f"planned: {format_bytes(num_bytes)} at {format_bytes(bandwidth)}/s a node"
    return Forecast(step_s=ledger.timing.step_s, save_s=save_s, grace_s=config.launcher.grace_s, source=source)
