"""Runs one node of a SLURM job: `python -m efflaunch.launcher.slurm.task RUN_DIR ATTEMPT@ADDRESS:PORT`, started by srun.

Exits 0 where the ranks ended together (done, or stopped and saved), else not, upon which srun ends the other nodes.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from ...errors import EXIT_DONE, EXIT_PREEMPTED, EXIT_RETRY, EXIT_USER, EfflaunchError
from ..agent import worker
from ..agent.signals import StopFlag, on_stop_signals
from ..config.run_config import SlurmConfig
from ..env import slurm_place
from ..nodes.meeting import Meeting
from ..nodes.node import take_part
from ..nodes.node_place import NodePlace
from ..output import lenient_output
from .files import stop_asked
from .script import JOB_DIR


def main(arguments: list[str]) -> int:
    """Run one attempt on this node; the return value is its exit code."""
    parser = argparse.ArgumentParser(prog="efflaunch.launcher.slurm.task")
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("meeting", type=Meeting.parse, metavar="ATTEMPT@ADDRESS:PORT")
    parser.add_argument("--entry", default=worker.TRAIN, help="training function as module:function")
    options = parser.parse_args(arguments)
    lenient_output()
    early = StopFlag()
    on_stop_signals(early)
    try:
        job = slurm_place()
    except EfflaunchError as error:
        print(f"efflaunch: {error}", file=sys.stderr, flush=True)
        return error.exit_code
    place = NodePlace(
        node=job.node,
        num_nodes=job.step_nodes,
        name=job.name,
        folder=JOB_DIR,
        exclude_key=f"{SlurmConfig.KEYS}.exclude",
        ends_with_others=True,  # by --kill-on-bad-exit
    )
    return take_part(options.run_dir, options.meeting, place, options.entry, early, lambda: stop_asked(options.run_dir, job))


if __name__ == "__main__":
    code = main(sys.argv[1:])
    # srun ends the other nodes for anything but 0.
    sys.exit({EXIT_PREEMPTED: EXIT_DONE, EXIT_USER: EXIT_USER, EXIT_DONE: EXIT_DONE}.get(code, EXIT_RETRY))
