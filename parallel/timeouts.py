"""One timeout for all collectives of a run: what is configured, and never less than several steps.

A rank may wait in a collective for as long as another one's whole step, and a GPU's collectives are timed from when they are enqueued,
which is long before they begin. Hangs are found by heartbeats; this ends what those do not see.
"""

from __future__ import annotations

import logging

from ..units import format_seconds
from .topology import Topology, set_timeout

log = logging.getLogger(__name__)
STEPS = 5.0
"""Expected steps that a collective may take at least."""


class CollectiveTimeout:
    """The timeout of a rank's collectives, which grows with the steps that are expected."""

    def __init__(self, topology: Topology, least_s: float) -> None:
        """All groups have `least_s` already."""
        self._topology, self.timeout_s = topology, least_s

    def expect(self, step_s: float) -> None:
        """Set the timeout for a step that is expected to take `step_s`."""
        needed = STEPS * step_s
        if needed <= self.timeout_s:
            return
        self.timeout_s = needed
        set_timeout(self._topology, needed)
        if self._topology.rank == 0:
            log.info("collectives may take %s, %g times the step expected", format_seconds(needed), STEPS)
