"""The real training function on ranks of which one fails, where everything that could be shut down blocks on the others.

`python blocked_side.py ARGUMENTS` is the efflaunch command with it. FAIL_RANK: the rank whose second backward step raises; unset: none.
Whatever is shut down leaves a file `shut-NAME-RANK` in the run directory, and never returns where a rank is to fail.
"""

from __future__ import annotations

import os
import sys
import threading
from pathlib import Path
from typing import Any


def train(config: Any, run_dir: Any, stop: Any, pulse: Any) -> int:
    """training.trainer.train on such ranks."""
    import torch.distributed as dist

    from efflaunch.memory.arena.step import DefaultAllocator
    from efflaunch.memory.offload.host_store import ArenaStore
    from efflaunch.parallel.sequence.service import PlanService
    from efflaunch.training import trainer
    from efflaunch.training.optimizers.host import HostUpdater

    failing = os.environ.get("FAIL_RANK")
    for owner, name in (
        (DefaultAllocator, "close"),
        (ArenaStore, "close"),
        (HostUpdater, "close"),
        (PlanService, "close"),
        (dist, "destroy_process_group"),
    ):
        setattr(owner, name, shut(getattr(owner, name), Path(run_dir), f"{owner.__name__}.{name}", blocks=failing is not None))
    if os.environ["RANK"] == failing:
        trainer.backward_step = failed(trainer.backward_step)  # type: ignore[assignment]
    return trainer.train(config, run_dir, stop, pulse)


def shut(close: Any, run_dir: Path, name: str, *, blocks: bool) -> Any:
    """`close`, seen; one that blocks waits for ever, as for a peer that never comes."""

    def closed(*args: Any, **kwargs: Any) -> Any:
        (run_dir / f"shut-{name}-{os.environ['RANK']}").touch()
        if blocks:
            threading.Event().wait()
        return close(*args, **kwargs)

    return closed


def failed(backward: Any) -> Any:
    """`backward_step` that raises at its second call."""
    calls: list[None] = []

    def raising(*args: Any, **kwargs: Any) -> Any:
        calls.append(None)
        if len(calls) == 2:
            raise RuntimeError("the wheels came off")
        return backward(*args, **kwargs)

    return raising


if __name__ == "__main__":
    from efflaunch.tests.other_training import run_with

    sys.exit(run_with("efflaunch.tests.blocked_side:train"))
