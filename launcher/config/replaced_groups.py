"""Says what a group that is chosen at a resume takes away: what had been set in it before. Pure but for reading option files."""

from __future__ import annotations

from typing import Any

from ...errors import ConfigError
from .compose import changed
from .conf_groups import options
from .overrides import Override, parse_overrides
from .run_config import Config
from .schema import dump_config, flat


def replaced_lines(before: Config, after: Config, overrides: list[Override], config_dir: str | None) -> list[str]:
    """A line for each group of `overrides` whose choice ends earlier settings: `before` is the run's own, `after` what it becomes.

    What the option that the run had sets by itself is not counted, nor what is typed again.
    """
    typed, lines = {item.key for item in overrides if not item.is_group}, []
    for group, option in {item.key: item.value for item in overrides if item.is_group}.items():
        old, new, own = (_values(config, group) for config in (before, after, _plain(before, group, config_dir)))
        gone = [key for key in old if old[key] not in (own.get(key), new.get(key)) and f"{group}.{key}" not in typed]
        if gone:
            named = ", ".join(f"{group}.{key}={_shown(old[key])} (now {_shown(new.get(key))})" for key in gone)
            lines.append(f"{group}={option} replaces all of {group}, also what had been set in it: {named}")
    return lines


def _plain(config: Config, group: str, config_dir: str | None) -> Config | None:
    """`config` with the option that it has of `group` as its file is; None where that cannot be known."""
    name = getattr(config, group).name
    try:
        return changed(config, parse_overrides([f"{group}={name}"], config_dir), config_dir) if name in options(group, config_dir) else None
    except ConfigError:
        return None


def _values(config: Config | None, group: str) -> dict[str, Any]:
    return {} if config is None else {key: value for key, value in flat(dump_config(config)[group]) if key != "name"}


def _shown(value: Any) -> str:
    return "null" if value is None else str(value)
