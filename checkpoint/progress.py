"""How far a restore has come: a sign of life for every chunk, and lines for people where it takes long."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

from ..units import format_bytes, format_seconds

log = logging.getLogger(__name__)
_SAY_S = 30.0
"""Between two lines. What is read sooner is not announced at all."""


class RestoreProgress:
    """Of one rank. `heard` is called for whatever is read, by one thread at a time; `says`: whether it logs."""

    def __init__(self, heard: Callable[[], None] = lambda: None, *, says: bool = False) -> None:
        self._heard, self._says = heard, says
        self._what, self._began, self._told, self._read, self._total = "", 0.0, 0.0, 0, 0

    def begin(self, what: str, total: int) -> None:
        """`total`: bytes this rank is about to read; 0: nobody knows."""
        self._what, self._read, self._total = what, 0, total
        self._began = self._told = time.monotonic()

    def add(self, num_bytes: int) -> None:
        """So much more was read."""
        self._heard()
        self._read += num_bytes
        now = time.monotonic()
        if self._says and now - self._told > _SAY_S:
            self._told = now
            of = f" of {format_bytes(self._total)}" if self._total else ""
            log.warning("%s: this rank has read %s%s in %s", self._what, format_bytes(self._read), of, format_seconds(now - self._began))
