"""`efflaunch resume RUN_DIR`: resume a run directory, with changes if wanted."""

from __future__ import annotations

import argparse

from .arguments import CommandParser, add_dry_run, add_own_files, add_run_dir

DESCRIPTION = "Go on from the last checkpoint, after a stop, a crash or a finished run (train.steps=MORE)."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `efflaunch resume`."""
    add_run_dir(parser)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="changes to the stored configuration")
    add_own_files(parser)
    add_dry_run(parser)


def main(words: list[str]) -> int:
    """Resume the run; returns the job's exit code."""
    parser = CommandParser("resume", DESCRIPTION)
    add_arguments(parser)
    options = parser.parse_intermixed_args(words)
    from .. import start

    return start.resume(options.run_dir, options.overrides, options.config_dir, dry_run=options.dry_run)
