"""Decides what of a user's ds_config.json goes to DeepSpeed, and refuses what this configuration says otherwise. Pure but for one file.

Every key is one of the table's (ds_config_keys.py). All that is wrong with a file is one error: what to type is in its hint, once.
"""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

from ...errors import ConfigError
from .ds_config_keys import PASSED, REMOVE, TABLE, ZERO, Agrees, Fixed, Passed, Unsupported

AUTO = "auto"
"""Value that leaves a key to whoever reads the file; what Hugging Face's files are full of."""


@dataclass(frozen=True, slots=True)
class DsConfig:
    """What a file says that can be run."""

    zero: Mapping[str, Any]
    """Keys of zero_optimization that go to DeepSpeed as they are."""
    agreed: tuple[str, ...]
    """Keys that say what the configuration says."""
    auto: tuple[str, ...]
    """Keys that are left to the configuration."""


@dataclass(frozen=True, slots=True)
class _Problem:
    found: str
    hint: str
    override: str | None = None
    """What to type, where that is all; `hint` is said otherwise."""


def read_file(path: str) -> dict[str, Any]:
    """The content of a ds_config.json. ConfigError where there is none, or it is no JSON, or has a key twice."""
    expected, hint = "a ds_config.json of DeepSpeed", "engine.config=FILE, or engine.config=null"
    try:
        content = json.loads(Path(path).expanduser().read_text(encoding="utf-8"), object_pairs_hook=_once)
    except OSError as error:
        raise ConfigError("engine.config", found=f"{path}: {error.strerror}", expected=expected, hint=hint) from error
    except (ValueError, RecursionError) as error:
        problem = str(error).splitlines()[0] if isinstance(error, ValueError) else "groups nested without end"
        raise ConfigError("engine.config", found=f"{path}, which is no JSON: {problem}", expected=expected, hint=hint) from error
    if not isinstance(content, dict):
        raise ConfigError("engine.config", found=f"{path} with no keys", expected=expected, hint=hint)
    return content


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A group of pairs; ValueError for a key that stands there twice, of which JSON would keep the last."""
    group = dict(pairs)
    if len(group) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)} stands there twice")
    return group


def ds_config(content: Mapping[str, Any], config: object, file: str) -> DsConfig:
    """What `content` says, beside our `config` (dataclasses of dataclasses). ConfigError that names every key that cannot be."""
    zero: dict[str, Any] = {}
    agreed, auto, problems = [], [], []
    stage = _stage(content, config)
    for name, value in _leaves(content):
        if value == AUTO:
            auto.append(name)
            continue
        problem = _problem(name, value, config, stage)
        if problem is not None:
            problems.append(problem)
        elif isinstance(row := TABLE[name], Passed):
            zero[(row.sent_as or name).removeprefix(ZERO)] = row.kind(value)
        else:
            agreed.append(name)
    if problems:
        raise ConfigError(
            f"engine.config={file}",
            found="; ".join(each.found for each in problems),
            expected='keys that say what this configuration says, are "auto", or go to DeepSpeed (docs/engines.md)',
            hint=_hint(problems),
        )
    return DsConfig(zero, tuple(agreed), tuple(auto))


def _stage(content: Mapping[str, Any], config: object) -> int:
    """The stage a file is for: its own where it has one, so that its other keys are judged as it means them."""
    group = content.get("zero_optimization")
    own = group.get("stage") if isinstance(group, Mapping) else None
    return own if own in (1, 2, 3) else int(typed(config, "engine.stage"))


def _hint(problems: list[_Problem]) -> str:
    """What to type for all of them at once, and what to change in the file."""
    overrides = " ".join(dict.fromkeys(each.override for each in problems if each.override is not None))
    rest = [each.hint for each in problems if each.override is None]
    return "; ".join(dict.fromkeys([overrides, *rest] if overrides else rest))


def describe(said: DsConfig, file: str) -> str:
    """One line: what of a file goes to DeepSpeed, what agrees, what is left to the configuration."""
    sent = ", ".join(f"{name}={_typed(value)}" for name, value in said.zero.items()) or "nothing"
    agreed, auto = ", ".join(said.agreed) or "nothing", ", ".join(said.auto) or "nothing"
    return f"{file}: to DeepSpeed goes {sent}; as here: {agreed}; auto: {auto}"


def check_zero(zero: Mapping[str, Any], stage: int) -> None:
    """ConfigError for a key of engine.zero that does not go to DeepSpeed."""
    rows = {row.name.removeprefix(ZERO): row for row in PASSED if row.sent_as is None}
    for name, value in zero.items():
        if name not in rows:
            near = difflib.get_close_matches(name, rows, 1)
            hint = f"engine.zero={{{near[0]}: {value}}}" if near else "engine.config=FILE checks a whole ds_config.json"
            raise ConfigError(f"engine.zero.{name}", found="a key that is not passed on", expected=f"one of {', '.join(rows)}", hint=hint)
        if (problem := _unreadable(rows[name], value, stage)) is not None:
            raise ConfigError(f"engine.zero.{name}", found=problem.found, expected="a value DeepSpeed takes", hint=problem.hint)


def _leaves(content: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of each row of the table, and of what the table has not."""
    for key, value in content.items():
        name = f"{prefix}{key}"
        if name not in TABLE and isinstance(value, Mapping) and any(row.startswith(f"{name}.") for row in TABLE):
            yield from _leaves(value, f"{name}.")
        else:
            yield name, value


def _problem(name: str, value: Any, config: object, stage: int) -> _Problem | None:
    """What is wrong with one key, None where nothing is."""
    row = TABLE.get(name)
    if row is None:
        near = difflib.get_close_matches(name, list(TABLE), 1)
        return _Problem(f"{name}, which no DeepSpeed reads", f"did you mean {near[0]}?" if near else f"remove {name}")
    if isinstance(row, Unsupported):
        hint = f"remove {name}" if row.instead == REMOVE else f"in place of {name}, {row.instead}"
        return None if _is_off(value) else _Problem(f"{name} ({row.reason})", hint)
    if isinstance(row, Fixed):
        is_fixed = any(_same(value, each) for each in row.values)
        return None if is_fixed else _Problem(f"{name}={json.dumps(value)} ({row.reason})", f"{row.instead} for {name}")
    return _disagreement(row, value, config) if isinstance(row, Agrees) else _unreadable(row, value, stage)


def _is_off(value: Any) -> bool:
    """Whether a refused key asks for nothing."""
    if isinstance(value, Mapping):
        nested = value.get("enabled", value.get("device", True))
        return not value or nested in (False, AUTO, "none", None)
    return value is None or value is False or value == []


def _same(value: Any, other: Any) -> bool:
    """Whether two values are one, where true is no 1 and a list may be a tuple."""
    if isinstance(value, list):
        return isinstance(other, tuple) and tuple(value) == other
    return isinstance(value, bool) is isinstance(other, bool) and bool(value == other)


def _disagreement(row: Agrees, value: Any, config: object) -> _Problem | None:
    theirs, ours = _typed(value), typed(config, row.ours)
    theirs = row.words.get(theirs.lower(), theirs)
    if _number(theirs) == _number(ours) if _number(theirs) is not None else theirs.lower() == ours.lower():
        return None
    return _Problem(f"{row.name}={json.dumps(value)}, where {row.ours}={ours}", "", override=f"{row.ours}={theirs}")


def _unreadable(row: Passed, value: Any, stage: int) -> _Problem | None:
    if stage not in row.stages:
        stages = " and ".join(map(str, row.stages))
        return _Problem(f"{row.name}, which stage {stage} does not read (stages {stages} do)", f"remove {row.name}")
    if row.kind is bool:
        return None if isinstance(value, bool) else _Problem(f"{row.name}={json.dumps(value)}, no truth value", f"{row.name}: true")
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    is_count = is_number and math.isfinite(value) and value >= row.least and value == int(value) and int(value) % row.multiple == 0
    expected = "number of elements" + (f" from {row.least} on, divisible by {row.multiple}" if row.multiple > 1 else "")
    return None if is_count else _Problem(f"{row.name}={json.dumps(value)}, no {expected}", f"{row.name}: 500000000")


def typed(config: object, key: str) -> str:
    """The value of one of our keys, as a person types it."""
    value = config
    for part in key.split("."):
        value = getattr(value, part)
    return _typed(value)


def _typed(value: Any) -> str:
    if isinstance(value, Enum):
        return str(value.value)
    if isinstance(value, list):
        return f"[{','.join(map(_typed, value))}]"
    if isinstance(value, float) and float(f"{value:g}") == value:
        return f"{value:g}"
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def _number(text: str) -> tuple[float, ...] | None:
    """The number, or the numbers of a list, that a text is; None where it is none."""
    try:
        return tuple(float(each) for each in text.strip("[]").split(","))
    except ValueError:
        return None
