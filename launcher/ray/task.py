"""The agent of one node on Ray: `python -m efflaunch.launcher.ray.task RUN_DIR MEETING --node I --num-nodes N`, started by its actor."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from ..agent import worker
from ..agent.signals import StopFlag, die_with_parent, on_stop_signals, release_stop_signals
from ..config.run_config import RayConfig
from ..nodes.meeting import Meeting
from ..nodes.node import take_part
from ..nodes.node_place import NodePlace
from ..output import lenient_output
from .request import FOLDER


def main(arguments: list[str]) -> int:
    """Run one attempt on this node; the return value is its exit code."""
    parser = argparse.ArgumentParser(prog="efflaunch.launcher.ray.task")
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("meeting", type=Meeting.parse, metavar="ATTEMPT@ADDRESS:PORT")
    parser.add_argument("--node", type=int, required=True)
    parser.add_argument("--num-nodes", type=int, required=True)
    parser.add_argument("--name", required=True)
    parser.add_argument("--entry", default=worker.TRAIN, help="training function as module:function")
    parser.add_argument("--parent", type=int, required=True, help="process whose death ends this one")
    options = parser.parse_args(arguments)
    lenient_output()
    die_with_parent(options.parent)
    early = StopFlag()
    on_stop_signals(early)
    # Ray's workers hold some signals back, and what they start inherits that.
    release_stop_signals()
    exclude_key = f"{RayConfig.KEYS}.exclude"
    place = NodePlace(node=options.node, num_nodes=options.num_nodes, name=options.name, folder=FOLDER, exclude_key=exclude_key)
    return take_part(options.run_dir, options.meeting, place, options.entry, early, lambda: False)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
