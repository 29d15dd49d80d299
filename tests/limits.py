"""How long tests wait: no test depends on how fast the machine is. Clocks are injected and events awaited.

`ENDS_S` stands wherever only "it ends" is tested: a limit that no run meets on a machine as busy as may be, and that a hang does.
tests/test_limits.py finds what has a limit of its own.
"""

from __future__ import annotations

import time
from collections.abc import Callable

ENDS_S = 900.0


def wait_until(condition: Callable[[], object], what: str = "waited too long", pause_s: float = 0.02) -> None:
    """Returns once `condition()` holds; AssertionError with `what` after ENDS_S."""
    deadline = time.monotonic() + ENDS_S
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(pause_s)
