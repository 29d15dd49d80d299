"""Quantities as people write them: `1M` tokens, `80GiB`, `4h`. Pure, no imports beyond the standard library."""

from __future__ import annotations

import math
import re
from typing import Annotated

Tokens = Annotated[int, "tokens"]
"""A count of tokens; K and M are binary here (`8K` = 8192, `1M` = 1048576), as context lengths are named."""
Bytes = Annotated[int, "bytes"]
"""A size; `GiB` is binary, `GB` decimal."""
Seconds = Annotated[float, "seconds"]
"""A duration; `90`, `90s`, `15m`, `4h`, `2d`."""
Nodes = Annotated[str, "nodes"]
"""A number of nodes or a range of it, both ends included; `4`, `2:4`."""

_NUMBER = re.compile(r"^\s*([0-9][0-9_]*(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?)\s*([A-Za-z]*)\s*$")
_SCALES: dict[str, dict[str, float]] = {
    "tokens": {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30},
    "bytes": {"": 1, "B": 1, "KB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12, "KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30, "TIB": 1 << 40},
    "seconds": {"": 1, "MS": 1e-3, "S": 1, "M": 60, "MIN": 60, "H": 3600, "D": 86400},
}
_EXAMPLES = {"tokens": "8192, 8K, 1M", "bytes": "512MiB, 80GiB, 80GB", "seconds": "90, 15m, 4h"}


def parse_quantity(value: object, unit: str) -> int | float:
    """The number behind `value` in `unit` (`tokens`, `bytes`: int; `seconds`: float). ValueError says what is accepted."""
    expected = f"{unit} as a number or like {_EXAMPLES[unit]}"
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        raise ValueError(f"{expected}, not {value!r}")
    match = _NUMBER.match(str(value))
    if match is None or match[2].upper() not in _SCALES[unit]:
        raise ValueError(f"{expected}, not {value!r}")
    amount = float(match[1].replace("_", "")) * _SCALES[unit][match[2].upper()]
    if not math.isfinite(amount):
        raise ValueError(f"{expected}, not {value!r}")
    if unit == "seconds":
        return amount
    if amount != int(amount):
        raise ValueError(f"a whole number of {unit}, not {value!r}")
    return int(amount)


def parse_nodes(value: object) -> str:
    """`4` or `2:4` behind 4, "4", "2:4" or "2-4"; whether the ends are in order is not looked at. ValueError says what is accepted."""
    match = re.fullmatch(r"\s*(\d+)(?:\s*[:-]\s*(\d+))?\s*", str(value))
    if match is None or isinstance(value, bool):
        raise ValueError(f"nodes as a number or like 2:4 (in a file: '2:4', with quotes), not {value!r}")
    return match[1] if match[2] is None else f"{match[1]}:{match[2]}"


def format_bytes(num_bytes: float) -> str:
    """`1.5 GiB`; one unit, at most one decimal."""
    for unit, size in (("TiB", 1 << 40), ("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if abs(num_bytes) >= size:
            return f"{num_bytes / size:.1f} {unit}"
    return f"{int(num_bytes)} B"


def format_tokens(num_tokens: int) -> str:
    """`8K`, `1M` where exact in binary, else grouped digits."""
    for unit, size in (("M", 1 << 20), ("K", 1 << 10)):
        if num_tokens >= size and num_tokens % size == 0:
            return f"{num_tokens // size}{unit}"
    return f"{num_tokens:,}"


def format_seconds(seconds: float) -> str:
    """`0.25 s`, `42 s`, `3 min 20 s`, `2 h 5 min`, `3 d 4 h`."""
    if seconds < 10:
        return f"{seconds:.2f} s"
    total = round(seconds)
    if total < 60:
        return f"{total} s"
    if total < 3600:
        return f"{total // 60} min {total % 60} s"
    if total < 86400:
        return f"{total // 3600} h {total % 3600 // 60} min"
    return f"{total // 86400} d {total % 86400 // 3600} h"


def format_precise(seconds: float) -> str:
    """Three digits, for times that are compared: `850 us`, `12.3 ms`, `1.23 s`, `184 s`, `2,500 s`."""
    for unit, size in (("us", 1e-6), ("ms", 1e-3)):
        if 0 < abs(seconds) < 999.5 * size:
            return f"{_three_digits(seconds / size)} {unit}"
    return f"{_three_digits(seconds)} s"


def _three_digits(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 99.95 else f"{value:.1f}" if abs(value) >= 9.995 else f"{value:.2f}"
