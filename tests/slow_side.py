"""The real training function with ranks that are not as they should be; `python slow_side.py ARGUMENTS` is the efflaunch command with it.

SLOW_RANK: that rank's layers take SLOW_S seconds more each. STOP_RANK: that rank is stopped (SIGSTOP) in the middle of step STOP_STEP,
once per run directory. HOLD_STEPS, as `6,14`: rank 0 makes the file `held-6` in the run directory in the middle of the sixth step of its
life and waits for `released-6`, once per run directory: what a test does meanwhile happens at that step. FAKE_CLOCK=rest: hangs are
timed by rest.RestClock. SPOIL_STEP: at that call of its backward step, one number of
rank 0's first weights becomes NaN. CHECKPOINT_FAULT: of rank 0's checkpoints, as in checkpoint/faults.py.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

from efflaunch.tests.launcher import rest
from efflaunch.tests.limits import wait_until


def train(config: Any, run_dir: Any, stop: Any, pulse: Any) -> int:
    """training.trainer.train on such a rank."""
    from efflaunch.memory.executor import layer
    from efflaunch.training import session
    from efflaunch.training import trainer as run

    rank = os.environ["RANK"]
    if rank == os.environ.get("SLOW_RANK"):
        layer._forward = slowed(layer._forward, float(os.environ["SLOW_S"]))  # type: ignore[assignment]
    if rank == os.environ.get("STOP_RANK"):
        run.backward_step = stopped(run.backward_step, int(os.environ["STOP_STEP"]), Path(run_dir) / "was-stopped")  # type: ignore[assignment]
    if rank == "0" and os.environ.get("SPOIL_STEP"):
        run.backward_step = spoiled(run.backward_step, int(os.environ["SPOIL_STEP"]))  # type: ignore[assignment]
    if rank == "0" and os.environ.get("CHECKPOINT_FAULT"):
        session.CheckpointEngine = partial(session.CheckpointEngine, fault=os.environ["CHECKPOINT_FAULT"])  # type: ignore[assignment,misc]
    if rank == "0" and os.environ.get("HOLD_STEPS"):
        run.backward_step = held(run.backward_step, set(map(int, os.environ["HOLD_STEPS"].split(","))), Path(run_dir))  # type: ignore[assignment]
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


def spoiled(backward: Any, step: int) -> Any:
    """`backward_step` that spoils the first weights before its call number `step`."""
    import torch

    from efflaunch.parallel.sharding.parts import memory_of

    calls = 0

    def with_nan(setup: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == step:
            with torch.no_grad():
                memory_of(next(setup.model.parameters())).view(-1)[0] = float("nan")
        return backward(setup, *args, **kwargs)

    return with_nan


def held(backward: Any, steps: set[int], run_dir: Path) -> Any:
    """`backward_step` that waits at its calls of these numbers before it does anything."""
    calls = 0

    def with_hold(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        marker, released = run_dir / f"held-{calls}", run_dir / f"released-{calls}"
        if calls in steps and not marker.exists():
            marker.touch()
            wait_until(released.exists)
        return backward(*args, **kwargs)

    return with_hold


if os.environ.get("FAKE_CLOCK") == "rest":
    rest.install()
if __name__ == "__main__":
    from efflaunch.tests.other_training import run_with

    sys.exit(run_with("efflaunch.tests.slow_side:train"))
