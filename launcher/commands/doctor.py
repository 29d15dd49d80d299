"""`efflaunch doctor`: what of this machine, its software and its storage is fit for which work, before anything is started."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...errors import EXIT_DONE, EXIT_USER, ConfigError
from ...utils.ranges import Range
from ...utils.text import plain, plain_data
from .arguments import CommandParser, add_json, number_in

if TYPE_CHECKING:
    from ..doctor.examination import Examination

DESCRIPTION = (
    "Look at packages, torch, GPUs, limits, clock, network, SLURM and storage, and say what can be done here and what is missing for the "
    "rest. Exit code 0: what is needed or there works; 93: something is broken."
)
_MIB = 1 << 20
_MOST_MIB = 1 << 20


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `efflaunch doctor`."""
    parser.add_argument("directory", nargs="?", type=Path, default=Path(), metavar="DIR", help="where runs will be written (default: here)")
    parser.add_argument(
        "--storage-mib",
        type=number_in(int, Range(0, _MOST_MIB)),
        default=256,
        metavar="N",
        help="MiB written there, read back and removed, to measure it; 0 writes nothing (default: 256)",
    )
    add_json(parser, "everything that was found, as JSON")


def main(words: list[str]) -> int:
    """Run `efflaunch doctor` and return its exit code."""
    parser = CommandParser("doctor", DESCRIPTION)
    add_arguments(parser)
    options = parser.parse_args(words)
    directory: Path = options.directory
    if not directory.is_dir():
        found = "a file" if directory.exists() else "no such directory"
        raise ConfigError(str(directory), found=found, expected="a directory that runs will be written to", hint=f"mkdir -p {directory}")
    try:
        from ..doctor.examination import examine
    except ModuleNotFoundError as error:
        raise ConfigError(
            "packages", found=f"{error.name} is not installed", expected="what efflaunch depends on", hint="pip install efflaunch"
        ) from error

    def progress(what: str) -> None:
        if not options.json:
            print(f"looking at {what}", file=sys.stderr, flush=True)

    examined = examine(directory, num_bytes=options.storage_mib * _MIB, on_progress=progress)
    facts = plain_data(describe(examined))
    print(json.dumps(facts, indent=1) if options.json else plain("\n".join(lines(facts))))
    return EXIT_DONE if examined.is_fit else EXIT_USER


def describe(examined: Examination) -> dict[str, Any]:
    """The stable form of an examination."""
    return {
        "fit": examined.is_fit,
        "findings": [
            {"topic": each.topic, "name": each.name, "state": each.state.value, "found": each.found, "hint": each.hint}
            for each in examined.findings
        ],
        "works": [{"name": each.name, "can": each.can_be_done, "missing": list(each.missing)} for each in examined.works],
    }


def lines(facts: dict[str, Any]) -> list[str]:
    """The examination as lines of text: findings by topic, then what can be done."""
    findings = facts["findings"]
    width = max(len(each["name"]) for each in findings) + 2
    out: list[str] = []
    for topic in dict.fromkeys(each["topic"] for each in findings):
        out += ["", topic] if out else [topic]
        for each in (each for each in findings if each["topic"] == topic):
            mark = "" if each["state"] == "ok" else f"{each['state']}: "
            out.append(f"  {each['name']:<{width}}{mark}{each['found']}")
            out += [f"  {'':<{width}}{each['hint']}"] * bool(each["hint"])
    works = facts["works"]
    column = max(len(each["name"]) for each in works) + 2
    out += ["", "what can be done here"]
    out += [f"  {each['name']:<{column}}{'yes' if each['can'] else 'no: ' + '; '.join(each['missing'])}" for each in works]
    return out
