"""Planning problems as CSV files in minimalloc's format: one block a line, `id,lower,upper,size` and more columns if any.

A block lives in [lower, upper). Several may begin and end at one time, so a time here is a moment of change, not one event.
"""

from __future__ import annotations

import csv
from pathlib import Path

from ...errors import DataError
from .trace import Trace

COLUMNS = ("lower", "upper", "size")


def read_instance(path: Path) -> Trace:
    """DataError for a file that is not one."""
    try:
        with path.open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        blocks = [tuple(int(row[column]) for column in COLUMNS) for row in rows]
        times = sorted({time for lower, upper, _ in blocks for time in (lower, upper)})
        event = {time: index for index, time in enumerate(times)}
        births, deaths, sizes = (tuple(column) for column in zip(*((event[a], event[b], size) for a, b, size in blocks), strict=True))
        return Trace(sizes, births, deaths, len(times) - 1)
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(
            str(path), found=f"a file that cannot be read as blocks ({error})", expected="lines of id,lower,upper,size",
            hint="a header line `id,lower,upper,size`, then whole numbers with lower < upper and size > 0",
        ) from error  # fmt: skip
