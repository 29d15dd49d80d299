"""The real training function on ranks that are started as those of GPUs are: spawned, with nothing of the agent's memory.

`python spawn_side.py ARGUMENTS` is the efflaunch command with it. Each rank leaves `spawned-R` in the run directory, with its command line.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

from efflaunch.launcher.agent import agent


def train(config: Any, run_dir: Any, stop: Any, pulse: Any) -> int:
    """training.trainer.train."""
    from efflaunch.training import trainer

    (Path(run_dir) / f"spawned-{os.environ['RANK']}").write_text(" ".join(sys.orig_argv))
    return trainer.train(config, run_dir, stop, pulse)


if __name__ == "__main__":
    from efflaunch.tests.other_training import run_with

    sys.exit(run_with("efflaunch.tests.spawn_side:train"))
# The agent imports this module before it starts ranks, and asks then.
agent.start_method = lambda config: "spawn"
