"""The real training function with ranks that are not as they should be; `python slow_side.py ARGUMENTS` is the efflaunch command with it.

SLOW_RANK: that rank's layers take SLOW_S seconds more each. STOP_RANK: that rank is stopped (SIGSTOP) in the middle of step STOP_STEP,
once per run directory.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path
from typing import Any


def train(config: Any, run_dir: Any, stop: Any, pulse: Any) -> int:
    """training.trainer.train on such a rank."""
    from efflaunch.memory.executor import layer
    from efflaunch.training import trainer as run

    rank = os.environ["RANK"]
    if rank == os.environ.get("SLOW_RANK"):
        layer._forward = slowed(layer._forward, float(os.environ["SLOW_S"]))  # type: ignore[assignment]
    if rank == os.environ.get("STOP_RANK"):
        run.backward_step = stopped(run.backward_step, int(os.environ["STOP_STEP"]), Path(run_dir) / "was-stopped")  # type: ignore[assignment]
    return run.train(config, run_dir, stop, pulse)


def slowed(forward: Any, seconds: float) -> Any:
    """The forward of a layer, and a nap."""

    def slow(*args: Any, **kwargs: Any) -> Any:
        time.sleep(seconds)
        return forward(*args, **kwargs)

    return slow


def stopped(backward: Any, step: int, marker: Path) -> Any:
    """`backward_step` that stops its own process before it does anything, at its call number `step`."""
    calls = 0

    def with_stop(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == step and not marker.exists():
            marker.touch()
            os.kill(os.getpid(), signal.SIGSTOP)
        return backward(*args, **kwargs)

    return with_stop


if __name__ == "__main__":
    from efflaunch.tests.other_training import run_with

    sys.exit(run_with("efflaunch.tests.slow_side:train"))
