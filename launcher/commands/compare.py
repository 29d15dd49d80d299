"""`efflaunch compare`: runs side by side."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from ...errors import EXIT_DONE
from ...units import format_bytes, format_seconds
from ..report.comparison import compared
from .arguments import CommandParser, add_json

DESCRIPTION = "Runs side by side: loss, evaluations, speed, memory, and the settings in which they differ."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `efflaunch compare`."""
    parser.add_argument("run_dirs", type=Path, nargs="+", metavar="RUN_DIR")
    add_json(parser)


def main(words: list[str]) -> int:
    """Run `efflaunch compare` and return its exit code."""
    parser = CommandParser("compare", DESCRIPTION)
    add_arguments(parser)
    options = parser.parse_args(words)
    return print_comparison(options.run_dirs, as_json=options.json)


def print_comparison(run_dirs: list[Path], *, as_json: bool) -> int:
    """Print the table, or it as JSON. ConfigError where one of them is no run directory."""
    from ..report.facts import read_facts

    facts = compared([read_facts(run_dir) for run_dir in run_dirs])
    print(json.dumps(facts, indent=1) if as_json else "\n".join(describe(facts)))
    return EXIT_DONE


def describe(facts: dict[str, Any]) -> list[str]:
    """The comparison as lines of text: a row each fact, a column each run."""
    runs = facts["runs"]
    rows = [
        ["run", *(run["run"] for run in runs)],
        ["state", *(run["state"] for run in runs)],
        ["step", *(f"{run['step']} of {run['steps']}" for run in runs)],
        ["loss", *(_number(run["loss"], ".4f") for run in runs)],
        ["tokens", *(f"{run['tokens']:,}" for run in runs)],
        ["tokens/s", *(_number(run["tokens_per_s"], ",.0f") for run in runs)],
        ["tokens/s a rank", *(_number(run["device_tokens_per_s"], ",.0f") for run in runs)],
        ["MFU", *(_number(run["mfu"], ".1%") for run in runs)],
        ["peak memory", *("-" if run["peak_bytes"] is None else format_bytes(run["peak_bytes"]) for run in runs)],
        ["trained for", *(format_seconds(run["trained_s"]) for run in runs)],
        ["best", *("-" if run["best"] is None else f"{_number(run['best']['value'], '.4f')} at {run['best']['step']}" for run in runs)],
    ]
    metrics = sorted({name for run in runs for name in run["evaluations"] if "/position_" not in name})
    rows += [[name, *(_number(run["evaluations"].get(name), ".4f") for run in runs)] for name in metrics]
    rows += [[key, *("absent" if value is None else value for value in values)] for key, values in facts["settings"].items()]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)
