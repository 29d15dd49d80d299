"""Ranges of numeric configuration keys: each group declares them in `RANGES`, one function checks them. Pure."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, cast

from ..errors import ConfigError

# Ends that keep every product of counts inside 64 bits, and every wait inside what the system calls take.
STEPS = 10**12
TOKENS = 1 << 40
BYTES = 1 << 60
PER_S = 1e18
WAIT_S = 14 * 86400.0
"""A socket takes at most 2**31 ms."""
LONG_S = 100 * 365 * 86400.0
_CAP = 10_000
"""Upper ends from here on exist for arithmetic's sake, and are nobody's choice."""


@dataclass(frozen=True, slots=True)
class Range:
    """Finite numbers from `low` to `high`, both included unless `above` (without `low`) or `below` (without `high`)."""

    low: float
    high: float
    above: bool = False
    below: bool = False
    example: float | None = None
    """Value to type for a key without a default, where `low` is no sensible one."""

    def __contains__(self, value: float) -> bool:
        if isinstance(value, float) and not math.isfinite(value):
            return False
        return (self.low < value if self.above else self.low <= value) and (value < self.high if self.below else value <= self.high)

    def __str__(self) -> str:
        low = f"more than {_shown(self.low)}" if self.above else _shown(self.low)
        if self.above or self.below:
            return f"{low}{', ' if self.above else ' to '}{'below' if self.below else 'at most'} {_shown(self.high)}"
        if self.high >= _CAP:
            return f"{low} or more, at most {_shown(self.high)}"
        return f"{low} to {_shown(self.high)}"


def ranges_of(group: type) -> Mapping[str, Range]:
    """The declared ranges of a configuration group; empty where it has no numbers."""
    return dict(getattr(group, "RANGES", {}))


def check_ranges(group: Any, path: str) -> None:
    """ConfigError for the first number of the dataclass instance `group` outside its declared range; `path` is its key."""
    for name, allowed in ranges_of(type(group)).items():
        whole = f"{path}.{name}" if path else name
        for key, value in _numbers(getattr(group, name), whole):
            if value not in allowed:
                raise ConfigError(key, found=_in_words(value), expected=str(allowed), hint=range_hint(type(group), name, whole))


def range_hint(group: type, name: str, key: str) -> str:
    """Return what to type for a key whose value is outside its range: its default, else an end of the range."""
    field = cast(Any, group).__dataclass_fields__[name]
    allowed = ranges_of(group)[name]
    default = field.default_factory() if callable(field.default_factory) else field.default
    if isinstance(default, list) and default:
        return f"{key}=[{','.join(map(str, default))}]"
    if isinstance(default, dict):
        return f"{key}={{NAME: NUMBER}}"
    if isinstance(default, (int, float)):
        return f"{key}={default:g}" + (f", or {key}=null" if "None" in str(field.type) else "")
    low = allowed.low if not allowed.above else min(1, allowed.high)
    low = low if allowed.example is None else allowed.example
    return f"{key}=null, or a number such as {_plain(low)}" if default is None else f"{key}={_plain(low)}, or what you need"


def check_finite(value: Any, key: str) -> None:
    """ConfigError for NaN or an infinite number anywhere inside free-form values (mappings, lists)."""
    for where, number in _numbers(value, key):
        if isinstance(number, float) and not math.isfinite(number):
            raise ConfigError(where, found=_in_words(number), expected="a finite number", hint=f"{where}=1.0, or leave the key out")


def _numbers(value: Any, key: str) -> Iterator[tuple[str, float]]:
    """Every number of a field, with the key to name: the ends of `2:4` nodes, members of lists and mappings."""
    if isinstance(value, bool) or value is None:
        return
    if isinstance(value, (int, float)):
        yield key, value
    elif isinstance(value, str):
        yield from ((key, int(part)) for part in value.split(":") if part.isdecimal())
    elif isinstance(value, Mapping):
        for name, item in value.items():
            if not isinstance(item, str):
                yield from _numbers(item, f"{key}.{name}")
    elif isinstance(value, (list, tuple)):
        for index, item in enumerate(value):
            if not isinstance(item, str):
                yield from _numbers(item, f"{key}[{index}]")


def _in_words(value: float) -> str:
    if isinstance(value, float):
        return "a number that is not one (NaN)" if math.isnan(value) else f"{value:g}"
    return str(value) if abs(value) < 10**18 else f"a number of {len(str(abs(value)))} digits" if abs(value) < 10**1000 else "a huge number"


def _shown(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:g}"


def _plain(value: float) -> str:
    return str(value) if isinstance(value, int) else f"{value:g}"
