"""Sorts what is typed after the command: group choices, values, and their mistakes."""

from __future__ import annotations

import re
from dataclasses import dataclass

from ...errors import ConfigError
from .aliases import RENAMED, check_both, current_key, current_references, notify, old_references
from .conf_groups import EXPERIMENT, GROUPS, check_option
from .own_files import not_hydras
from .paths import expand_home

_OPENING, _CLOSING, _QUOTES = "([{", ")]}", "\"'"


@dataclass(frozen=True, kw_only=True, slots=True)
class Override:
    """One `key=value`; `text` is what Hydra is given."""

    key: str
    value: str
    text: str
    is_group: bool


def parse_overrides(arguments: list[str], config_dir: str | None = None) -> list[Override]:
    """Each argument as an Override. ConfigError for what is neither `key=value` nor `~key`, and for unknown options.

    `+` is neither needed nor refused: keys are checked against the dataclasses after composing, so a typo is
    found whether or not it was typed with a plus. Old names of renamed keys become the new ones, with a notice on stderr.
    """
    return [_parse(argument, config_dir) for argument in current_arguments(arguments)]


def current_arguments(arguments: list[str]) -> list[str]:
    """The arguments under the names of this version; a notice on stderr for each old one, ConfigError for both names of a key."""
    split = [argument.partition("=") for argument in arguments]
    keys = [key.lstrip("+") for key, _, _ in split]
    check_both(keys, "command line")
    notify([*(key for key in keys if key in RENAMED), *(old for _, _, value in split for old in old_references(value))])
    pluses = [key[: len(key) - len(key.lstrip("+"))] for key, _, _ in split]
    return [
        f"{plus}{current_key(key)}{separator}{current_references(value)}"
        for plus, key, (_, separator, value) in zip(pluses, keys, split, strict=True)
    ]


def _parse(argument: str, config_dir: str | None) -> Override:
    key, separator, value = argument.partition("=")
    name = key.lstrip("+")
    if key.startswith("~"):
        raise ConfigError(
            f"argument {argument!r}",
            found="a deletion",
            expected="key=value: every key has its place, and null stands for none",
            hint=f"{key.lstrip('~').partition('=')[0] or 'key'}=null, where that is a value of it",
        )
    if re.split(r"[./=@]", name)[0] == "hydra":
        raise not_hydras(f"argument {argument!r}")
    if not separator or not name or "@" in key or len(key) - len(name) > 2:
        raise ConfigError(
            f"argument {argument!r}",
            found="neither a command, an option nor key=value",
            expected="key=value with a dotted key, or group=option",
            hint="efflaunch train +experiment=quickstart train.steps=50",
        )
    if name == EXPERIMENT:
        check_option(name, value, config_dir)
        return Override(key=name, value=value, text=f"+{name}={value}", is_group=True)
    if name in GROUPS:
        check_option(name, value, config_dir)
        return Override(key=name, value=value, text=f"{name}={value}", is_group=True)
    value = expand_home(name, value)
    return Override(key=name, value=value, text=f"++{name}={value}", is_group=False)


def split_values(text: str) -> list[str]:
    """Values between commas as they are typed; those inside brackets or quotes, or after a backslash, belong to one value."""
    parts, depth, quote, escaped = [""], 0, "", False
    for letter in text:
        if escaped or letter == "\\":
            escaped = not escaped
        elif quote or letter in _QUOTES:
            quote = "" if letter == quote else quote or letter
        elif letter in _OPENING or letter in _CLOSING:
            depth += 1 if letter in _OPENING else -1
        elif letter == "," and depth == 0:
            parts.append("")
            continue
        parts[-1] += letter
    return parts
