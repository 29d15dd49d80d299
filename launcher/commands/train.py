"""`efflaunch train`: train, or resume the run of the same run.id."""

from __future__ import annotations

import argparse

from ...errors import EXIT_DONE
from .arguments import CommandParser, add_config_arguments, add_dry_run

DESCRIPTION = "Train. Every argument is GROUP=OPTION, +experiment=NAME or key=value."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `efflaunch train`."""
    add_config_arguments(parser)
    add_dry_run(parser)


def main(words: list[str]) -> int:
    """Train what the command line asks for; returns the job's exit code. --help lists every experiment, group and key."""
    parser = CommandParser("train", DESCRIPTION)
    add_arguments(parser)
    if "-h" in words or "--help" in words:
        from .help import train_help

        print(train_help(parser.format_help(), _option_value(words, "--config-dir")))
        return EXIT_DONE
    options = parser.parse_intermixed_args(words)
    from .. import start

    return start.train(options.overrides, options.config_dir, print_config=options.print_config, dry_run=options.dry_run)


def _option_value(words: list[str], option: str) -> str | None:
    for index, word in enumerate(words):
        if word.startswith(f"{option}="):
            return word.partition("=")[2]
        if word == option and index + 1 < len(words):
            return words[index + 1]
    return None
