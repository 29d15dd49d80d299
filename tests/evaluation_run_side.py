"""The real training function with an evaluation that waits; `python evaluation_run_side.py ARGUMENTS` is the efflaunch command with it.

HOLD_EVALUATION: rank 0 makes the file `held-evaluation` in the run directory in the middle of the evaluation after that step, and waits for
`released-evaluation`.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

from efflaunch.tests.limits import wait_until


def train(config: Any, run_dir: Any, stop: Any, pulse: Any) -> int:
    """training.trainer.train with such an evaluation."""
    from efflaunch.training import trainer
    from efflaunch.training.evaluation import during, measure

    if os.environ["RANK"] == "0":
        evaluate, add_step, folder = during.RunEvaluation._evaluate, measure.add_step, Path(run_dir)
        now = [-1]

        def evaluated(self: Any, done: int, flag: Any) -> bool:
            now[0] = done
            return evaluate(self, done, flag)

        def held(*args: Any, **kwargs: Any) -> None:
            if now[0] == int(os.environ["HOLD_EVALUATION"]) and not (folder / "held-evaluation").exists():
                (folder / "held-evaluation").touch(0o600)
                wait_until((folder / "released-evaluation").exists)
            add_step(*args, **kwargs)

        during.RunEvaluation._evaluate = evaluated  # type: ignore[method-assign]
        measure.add_step = held
    return trainer.train(config, run_dir, stop, pulse)


if __name__ == "__main__":
    from efflaunch.tests.other_training import run_with

    sys.path.insert(0, str(Path(__file__).resolve().parent))
    sys.exit(run_with("efflaunch.tests.evaluation_run_side:train"))
