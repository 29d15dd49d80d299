"""Parts that command lines share: a parser whose errors are ours, and arguments that several of them take."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from ...errors import ConfigError
from ...units import parse_quantity
from ...utils.ranges import LONG_S, STEPS, Range
from ..config.run_config import Config

STEP, SEARCH_S = Range(0, STEPS), Range(0, LONG_S, above=True)


def number_in(kind: type[int] | type[float], allowed: Range) -> Callable[[str], int | float]:
    """A reader of an option's number for argparse; the error says its range."""

    def read(text: str) -> int | float:
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or value not in allowed:
            raise argparse.ArgumentTypeError(f"{text!r} is not {'a whole number, ' if kind is int else ''}{allowed}")
        return value

    return read


def token_count(text: str) -> int:
    """A number of tokens for argparse, such as `128K`."""
    try:
        return int(parse_quantity(text, "tokens"))
    except (TypeError, ValueError, OverflowError) as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of tokens, such as 128K") from error


class CommandParser(argparse.ArgumentParser):
    """argparse whose errors are ConfigErrors: exit 93, and what to type."""

    def __init__(self, command: str, description: str) -> None:
        super().__init__(prog=f"efflaunch {command}", description=description, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        raise ConfigError(self.prog, found=message, expected=self.format_usage().strip(), hint=f"{self.prog} --help")


def add_config_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of commands that compose a configuration: overrides, --config-dir, --print-config."""
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="train.steps=50, model=qwen3_8b, +experiment=quickstart")
    parser.add_argument("--config-dir", metavar="DIR", help="your own files, as DIR/experiment/mine.yaml or DIR/model/mine.yaml")
    parser.add_argument("--print-config", action="store_true", help="print the resolved configuration and exit")


def add_run_dir(parser: argparse.ArgumentParser) -> None:
    """The run directory, as the first argument."""
    parser.add_argument("run_dir", type=Path, metavar="RUN_DIR")


def add_own_files(parser: argparse.ArgumentParser) -> None:
    """Adds --config-dir alone, for commands that do not compose from nothing."""
    parser.add_argument("--config-dir", metavar="DIR", help="your own configuration files")


def add_dry_run(parser: argparse.ArgumentParser) -> None:
    """Adds --dry-run."""
    parser.add_argument(
        "--dry-run", action="store_true", help="print exactly what would be submitted (on SLURM the script, on Ray the request), and stop"
    )


def add_json(parser: argparse.ArgumentParser, text: str = "machine-readable") -> None:
    """Adds --json."""
    parser.add_argument("--json", action="store_true", help=text)


def add_lengths(parser: argparse.ArgumentParser, *, required: bool) -> None:
    """Adds the sequence lengths of a step: --lengths, --sequences, --seed."""
    text = "wikipedia, commoncrawl, github, lognormal:MEDIAN:SIGMA, PREFIX.idx or a file of lengths"
    parser.add_argument("--lengths", metavar="FILE|DISTRIBUTION", required=required, help=text)
    parser.add_argument(
        "--sequences",
        type=number_in(int, Range(1, 1_000_000)),
        metavar="N",
        help="sequences of a step; without it data.global_batch_tokens decides",
    )
    parser.add_argument("--seed", type=number_in(int, Range(0, 1 << 63)), default=0, help="of the lengths that are drawn")


def add_certify(parser: argparse.ArgumentParser) -> None:
    """Adds --certify."""
    parser.add_argument(
        "--certify", type=number_in(float, SEARCH_S), metavar="S", help="look for a tighter lower bound, for up to so many seconds"
    )


def composed(options: argparse.Namespace) -> Config | None:
    """The configuration that parsed config arguments ask for; None where it only had to be printed, which is done."""
    from ..config.compose import compose
    from ..start import show_config

    config = compose(options.overrides, options.config_dir)
    if options.print_config:
        show_config(config)
        return None
    return config
