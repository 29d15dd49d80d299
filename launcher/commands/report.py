"""`efflaunch report`: one page of a run, that needs no network."""

from __future__ import annotations

import argparse
from pathlib import Path

from ...errors import EXIT_DONE, ConfigError
from ...units import format_bytes
from ...utils.atomic_files import write_atomic
from .arguments import CommandParser, add_run_dir

DESCRIPTION = "Write one self-contained page of a run: curves, evaluations, plans, memory, checkpoints, settings and their changes."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `efflaunch report`."""
    add_run_dir(parser)
    parser.add_argument("--out", type=Path, metavar="FILE", help="the page; RUN_DIR/report.html if not given")


def main(words: list[str]) -> int:
    """Run `efflaunch report` and return its exit code."""
    parser = CommandParser("report", DESCRIPTION)
    add_arguments(parser)
    options = parser.parse_args(words)
    return write_report(options.run_dir, options.out or options.run_dir / "report.html")


def write_report(run_dir: Path, out: Path) -> int:
    """Write the page to `out`. ConfigError where there is no run, matplotlib is missing, or `out` cannot be a page."""
    from ..report.facts import read_facts
    from ..report.page import page

    facts = read_facts(run_dir)
    if out.suffix not in (".html", ".htm"):
        raise ConfigError("--out", found=str(out), expected="a file name that ends in .html", hint=f"--out {out.name}.html")
    if not out.absolute().parent.is_dir():
        raise ConfigError("--out", found=f"no directory {out.parent}", expected="one that is there", hint=f"mkdir -p {out.parent}")
    text = page(facts)
    write_atomic(out, text)
    print(f"wrote {out}, {format_bytes(len(text.encode()))}: one file, nothing else is needed to look at it")
    return EXIT_DONE
