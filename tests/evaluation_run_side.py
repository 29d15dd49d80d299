"""The real training function with an evaluation that waits; `python evaluation_run_side.py ARGUMENTS` is the efflaunch command with it.

HOLD_EVALUATION: rank 0 makes the file `held-evaluation` in the run directory in the middle of the evaluation after that step, and waits for
`released-evaluation`. DIE_EVALUATION: rank 1 is killed there, once per run directory.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

from efflaunch.tests.limits import wait_until


def train(config: Any, run_dir: Any, stop: Any, pulse: Any) -> int:
    """training.trainer.train with such an evaluation."""
    from efflaunch.training import trainer
    from efflaunch.training.evaluation import during, measure

    rank, hold, die = (os.environ.get(name, "") for name in ("RANK", "HOLD_EVALUATION", "DIE_EVALUATION"))
    at = {"0": hold, "1": die}.get(rank)
    if at:
        evaluate, add_step, folder = during.RunEvaluation._evaluate, measure.add_step, Path(run_dir)
        marker, now = folder / ("held-evaluation" if hold else "died-evaluation"), [-1]

        def evaluated(self: Any, done: int, flag: Any) -> bool:
            now[0] = done
            return evaluate(self, done, flag)

        def held(*args: Any, **kwargs: Any) -> None:
            if now[0] == int(at) and not marker.exists():
                marker.touch(0o600)
                if die:
                    os.kill(os.getpid(), signal.SIGKILL)
                wait_until((folder / "released-evaluation").exists)
            add_step(*args, **kwargs)

        during.RunEvaluation._evaluate = evaluated  # type: ignore[method-assign]
        measure.add_step = held
    return trainer.train(config, run_dir, stop, pulse)


if __name__ == "__main__":
    from efflaunch.tests.other_training import run_with

    sys.path.insert(0, str(Path(__file__).resolve().parent))
    sys.exit(run_with("efflaunch.tests.evaluation_run_side:train"))
