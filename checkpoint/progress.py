"""Reports how far a restore has come: a sign of life for every chunk, and log lines where it takes long."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

from ..units import format_bytes, format_seconds

log = logging.getLogger(__name__)
_LOG_EVERY_S = 30.0
"""Between two lines. What is read sooner is not announced at all."""


class RestoreProgress:
    """Tracks a restore of one rank. `on_read` is called for whatever is read, by one thread at a time; `logs`: whether it logs."""

    def __init__(self, on_read: Callable[[], None] = lambda: None, *, logs: bool = False) -> None:
        self._on_read, self._logs = on_read, logs
        self._what, self._began, self._logged, self._read, self._total = "", 0.0, 0.0, 0, 0

    def begin(self, what: str, total: int) -> None:
        """Begin a part; `total`: bytes this rank is about to read; 0: nobody knows."""
        self._what, self._read, self._total = what, 0, total
        self._began = self._logged = time.monotonic()

    def add(self, num_bytes: int) -> None:
        """Count bytes that were read."""
        self._on_read()
        self._read += num_bytes
        now = time.monotonic()
        if self._logs and now - self._logged > _LOG_EVERY_S:
            self._logged = now
            of = f" of {format_bytes(self._total)}" if self._total else ""
            log.warning("%s: this rank has read %s%s in %s", self._what, format_bytes(self._read), of, format_seconds(now - self._began))
