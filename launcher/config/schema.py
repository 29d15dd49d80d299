"""Plain data to and from the configuration dataclasses, strictly. Imports neither torch nor Hydra.

`load_config(dump_config(config)) == config`. Every mistake is a ConfigError that names the key.
"""

from __future__ import annotations

import difflib
import types
import typing
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, Field, fields, is_dataclass
from enum import Enum
from typing import Annotated, Any, Union, get_args, get_origin, get_type_hints

from ...errors import ConfigError
from ...units import parse_nodes, parse_quantity
from ...utils.names import check_text, texts_of
from ...utils.ranges import check_finite, check_ranges, range_hint, ranges_of
from .aliases import REMOVED
from .run_config import Config

PROLOGUE = "cluster.slurm.prologue"
_SHOWN_CHARACTERS = 200
_PLAIN = {int: "a whole number", float: "a number", str: "a text", bool: "true or false"}


def load_config(data: Mapping[str, Any]) -> Config:
    """The checked configuration behind plain `data`; ConfigError on an unknown, missing or mistyped key, and on control characters."""
    for key, text in texts_of(data):
        # A prologue is a script already, and may be indented by tabs; it is a line an item all the same.
        check_text(key, text.replace("\t", " ") if key.startswith(PROLOGUE) else text)
    config = load(Config, data)
    assert isinstance(config, Config)
    return config


def load(kind: type, data: Any, path: str = "") -> Any:
    """An instance of the dataclass `kind` from a mapping; `path` is the key it stands under, for messages."""
    if not isinstance(data, Mapping):
        raise _mistyped(path or "configuration", data, "a group of keys")
    hints = get_type_hints(kind, include_extras=True)
    by_name = {field.name: field for field in fields(kind)}
    for key in data:
        if key not in by_name:
            raise unknown_key(_join(path, str(key)), [_join(path, name) for name in by_name])
    values = {}
    for name, field in by_name.items():
        if name in data:
            values[name] = _ranged_value(kind, name, hints[name], data[name], _join(path, name))
        elif is_required(field):
            raise missing_key(_join(path, name))
    group = kind(**values)
    check_ranges(group, path)
    return group


def _ranged_value(kind: type, name: str, hint: Any, data: Any, path: str) -> Any:
    """Check a value as _value does; for a field with a declared range the error names the range too."""
    allowed = ranges_of(kind).get(name)
    try:
        return _value(hint, data, path)
    except ConfigError as error:
        if allowed is None:
            raise
        raise ConfigError(
            error.where, found=error.found, expected=f"{error.expected}, {allowed}", hint=range_hint(kind, name, path)
        ) from error


def is_required(field: Field[Any]) -> bool:
    """Return whether the field has no default of its own."""
    return field.default is MISSING and field.default_factory is MISSING


def _value(hint: Any, data: Any, path: str) -> Any:
    origin, arguments = get_origin(hint), get_args(hint)
    if hint is Any:
        check_finite(data, path)
        return data
    if origin is Annotated:
        return _quantity(arguments[1], data, path)
    if origin in (Union, types.UnionType):
        return None if data is None else _value(_without_none(arguments), data, path)
    if origin is list:
        return [_value(arguments[0], item, f"{path}[{index}]") for index, item in enumerate(_list(data, path))]
    if origin is dict:
        if not isinstance(data, Mapping):
            raise _mistyped(path, data, "a group of keys")
        return {str(key): _value(arguments[1], item, _join(path, str(key))) for key, item in data.items()}
    if is_dataclass(hint):
        return load(typing.cast(type, hint), data, path)
    if issubclass(hint, Enum):
        return _member(hint, data, path)
    return _scalar(hint, data, path)


def _without_none(arguments: tuple[Any, ...]) -> Any:
    (kind,) = (argument for argument in arguments if argument is not type(None))
    return kind


def _list(data: Any, path: str) -> list[Any]:
    if not isinstance(data, (list, tuple)):
        raise _mistyped(path, data, "a list, [a,b]")
    return list(data)


def _quantity(unit: str, data: Any, path: str) -> int | float | str:
    try:
        return parse_nodes(data) if unit == "nodes" else parse_quantity(data, unit)
    except ValueError as error:
        accepted = str(error).partition(", not ")[0]
        raise _mistyped(path, data, accepted) from error


def _member(kind: type[Enum], data: Any, path: str) -> Enum:
    choices = [member.value for member in kind]
    # YAML reads a bare `off` as False.
    if data is False and "off" in choices:
        data = "off"
    if data in choices:
        return kind(data)
    near = difflib.get_close_matches(str(data), choices, 1)
    hint = f"{path}={near[0] if near else choices[0]}"
    raise ConfigError(path, found=_shown(data), expected=f"one of {', '.join(choices)}", hint=hint)


def _scalar(kind: type, data: Any, path: str) -> Any:
    if kind is float and isinstance(data, (int, float, str)) and not isinstance(data, bool):
        try:
            # YAML 1.1 reads `3e-4` as a text.
            return float(data)
        except (ValueError, OverflowError) as error:
            raise _mistyped(path, data, _PLAIN[float]) from error
    if isinstance(data, kind) and (kind is bool or not isinstance(data, bool)):
        return data
    if kind is int and isinstance(data, float) and data.is_integer():
        return int(data)
    raise _mistyped(path, data, _PLAIN[kind])


def dump_config(config: Config) -> dict[str, Any]:
    """Plain dicts, lists and scalars: what run.yaml holds. The exact inverse of load_config."""
    return {field.name: _plain(getattr(config, field.name)) for field in fields(config)}


def _plain(value: Any) -> Any:
    if is_dataclass(value) and not isinstance(value, type):
        return {field.name: _plain(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value


def walk_fields(kind: type = Config, path: str = "") -> Iterator[tuple[str, Any, Field[Any]]]:
    """(dotted key, type hint, dataclass field) of every key a person can set, groups opened."""
    hints = get_type_hints(kind, include_extras=True)
    for field in fields(kind):
        key, hint = _join(path, field.name), hints[field.name]
        if is_dataclass(hint):
            yield from walk_fields(typing.cast(type, hint), key)
        else:
            yield key, hint, field


def config_keys() -> list[str]:
    """Every dotted key, in order."""
    return [key for key, _, _ in walk_fields()]


def describe_type(hint: Any) -> str:
    """A type as a person reads it: `tokens`, `cosine|linear`, `number or null`."""
    origin, arguments = get_origin(hint), get_args(hint)
    if hint is Any:
        return "any"
    if origin is Annotated:
        return str(arguments[1])
    if origin in (Union, types.UnionType):
        return f"{describe_type(_without_none(arguments))} or null"
    if origin is list:
        return f"list of {describe_type(arguments[0])}"
    if origin is dict or is_dataclass(hint):
        return "keys and values"
    if issubclass(hint, Enum):
        return "|".join(member.value for member in hint)
    return {int: "int", float: "number", str: "text", bool: "true|false"}[hint]


def enum_values(hint: Any) -> list[str]:
    """List what can be typed for a key of this type; empty where the list would be long."""
    if get_origin(hint) in (Union, types.UnionType):
        return [*enum_values(_without_none(get_args(hint))), "null"]
    if isinstance(hint, type) and issubclass(hint, Enum):
        return [str(member.value) for member in hint]
    return ["true", "false"] if hint is bool else []


def unknown_key(key: str, valid: list[str]) -> ConfigError:
    """The error for a key no dataclass has, with the nearest one that exists, or what took its place."""
    if key in REMOVED:
        share = "cluster.gemm_efficiency=0.34 cluster.attention_efficiency=0.34, with the share it had, for the times it gave"
        return ConfigError(key, found="a key that is gone", expected=REMOVED[key], hint=share)
    everywhere = config_keys()
    near = (
        difflib.get_close_matches(key, valid, 1, 0.6) or difflib.get_close_matches(key, everywhere, 1, 0.6) or _same_leaf(key, everywhere)
    )
    parent = key.rpartition(".")[0] or "the configuration"
    names = ", ".join(name.rpartition(".")[2] for name in valid)
    hint = f"did you mean {near[0]}?" if near else "efflaunch train --help lists every key"
    return ConfigError(key, found="an unknown key", expected=f"a key of {parent}: {names}", hint=hint)


def _same_leaf(key: str, everywhere: list[str]) -> list[str]:
    leaves = {name.rpartition(".")[2]: name for name in everywhere}
    return [leaves[leaf] for leaf in difflib.get_close_matches(key.rpartition(".")[2], list(leaves), 1, 0.75)]


def missing_key(key: str) -> ConfigError:
    """The error for a required key without a value."""
    return ConfigError(key, found="no value", expected="a value: this key has no default", hint=f"{key}=...")


def _mistyped(path: str, data: Any, expected: str) -> ConfigError:
    return ConfigError(path, found=_shown(data), expected=expected, hint=f"{path}=... with {expected}")


def _shown(data: Any) -> str:
    if data is None:
        return "null"
    kinds = {str: "text", bool: "truth value", int: "number", float: "number", list: "list", dict: "group of keys"}
    try:
        text = repr(data)
    except (ValueError, RecursionError):  # digits beyond what Python prints; nesting beyond its stack
        text = "that is too large to show"
    return (
        f"the {kinds.get(type(data), type(data).__name__)} {text if len(text) <= _SHOWN_CHARACTERS else text[:_SHOWN_CHARACTERS] + '...'}"
    )


def _join(path: str, key: str) -> str:
    return f"{path}.{key}" if path else key


def flat(data: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    """Yields (dotted key, value) of every value of nested mappings."""
    for key, value in data.items():
        if isinstance(value, Mapping) and value:
            yield from flat(value, f"{path}{key}.")
        else:
            yield f"{path}{key}", value
