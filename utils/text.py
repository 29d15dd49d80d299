"""Text to show: without terminal escapes, and commands as a shell reads them. Pure."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from typing import Any

_UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
"""Control characters but newline and tab, what turns the direction of writing, line separators, and bytes that were no text."""


def plain(text: str) -> str:
    """`text` with every character that a terminal would act on, but newline and tab, spelled out as `\\x1b`."""
    return _UNPRINTABLE.sub(lambda match: match[0].encode("unicode_escape").decode("ascii"), text)


def plain_data(value: Any) -> Any:
    """Apply `plain` to every text in nested lists and mappings, keys included."""
    if isinstance(value, str):
        return plain(value)
    if isinstance(value, Mapping):
        return {plain_data(key): plain_data(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain_data(item) for item in value]
    return value


def typed(*words: object) -> str:
    """`efflaunch` and these words as a shell command that can be copied, whatever characters are in them."""
    return shlex.join(["efflaunch", *map(str, words)])
