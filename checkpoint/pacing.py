"""Paces saves and their copies: the measured side of interval.py and throttle.py."""

from __future__ import annotations

import logging
import time

from .attempt import Attempt
from .config import CheckpointConfig, Interval
from .interval import IntervalPlan, solve_interval
from .saver import Saver
from .throttle import Pace, Throttle

log = logging.getLogger(__name__)


class Pacing:
    """The pacing of one engine. `due` and `saving` get the same on every rank and so answer the same."""

    def __init__(self, config: CheckpointConfig) -> None:
        self.config = config
        self.costs = (0.0, 0.0)
        """Stall and time until durable of the newest save on this rank."""
        self._throttle = Throttle(config.max_slowdown)
        self._next: int | None = None
        self._interval = config.every_steps or 0
        self._last_update: float | None = None

    @property
    def measured(self) -> tuple[float, float, float]:
        """Measured stall, time until durable and step time, on this rank."""
        return (*self.costs, self._throttle.step_s)

    @property
    def is_eager(self) -> bool:
        """Whether save() makes the copies itself."""
        return self._throttle.pace is Pace.EAGER

    def due(self, step: int) -> bool:
        """Whether to save after `step` updates."""
        every = self.config.every_steps
        if self.config.interval is Interval.FIXED or every is None:
            return every is not None and step % every == 0
        if self._next is None:
            self._next = step - 1 + every
        return step >= self._next

    def saving(self, step: int, stall_s: float, durable_s: float, step_s: float) -> IntervalPlan | None:
        """Note that a save begins, with the largest of each time over all ranks; returns the plan where it has changed."""
        if self.config.interval is not Interval.AUTO or self.config.every_steps is None:
            return None
        plan = None
        if durable_s and step_s:
            failure_s = self.config.mean_time_to_failure_s
            plan = solve_interval(stall_s=stall_s, durable_s=durable_s, step_s=step_s, mean_time_to_failure_s=failure_s)
            if plan.steps == self._interval:
                plan = None
            else:
                self._interval = plan.steps
        self._next = step + self._interval
        return plan

    def note_step(self, attempt: Attempt | None, saver: Saver | None) -> None:
        """Note that an update begins; `attempt`: of the save whose copies ran behind the step that ends here."""
        now, before = time.monotonic(), self._last_update
        self._last_update = now
        if before is None:
            return
        stall_s, copy_s = (0.0, None) if attempt is None else (attempt.stall_s, attempt.snapshot_s)
        if self._throttle.add(now - before - stall_s, copy_s):
            log.warning("checkpoints: %s", self._throttle.reason)
        if attempt is not None and saver is not None:
            # Of the next snapshot; this one's own pauses are part of its time.
            num_chunks = len(attempt.layout.chunks)
            saver.delay_s = self._throttle.delay_s(attempt.snapshot_s - saver.delay_s * num_chunks, num_chunks)
