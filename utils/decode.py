"""JSON back into dataclasses, strictly: for files that people and crashes may have damaged."""

from __future__ import annotations

import math
import types
from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar, Union, cast, get_args, get_origin, get_type_hints

T = TypeVar("T")


def decode(kind: type[T], data: Any, where: str = "") -> T:
    """An instance of the dataclass `kind`. ValueError with the path of the first field that is missing, unknown or of another type."""
    if not isinstance(data, Mapping):
        raise _mistyped(where or kind.__name__, data, "an object")
    hints, by_name = get_type_hints(kind), {field.name: field for field in fields(cast(Any, kind))}
    unknown = [str(key) for key in data if key not in by_name]
    if unknown:
        raise ValueError(f"{where}{'.' if where else ''}{unknown[0]} is no field that this version knows")
    values = {}
    for name, field in by_name.items():
        path = f"{where}.{name}" if where else name
        if name in data:
            values[name] = _value(hints[name], data[name], path)
        elif field.default is MISSING and field.default_factory is MISSING:
            raise ValueError(f"{path} is missing")
    return kind(**values)


def _value(hint: Any, data: Any, path: str) -> Any:
    origin, arguments = get_origin(hint), get_args(hint)
    if hint is Any:
        return data
    if origin in (Union, types.UnionType):
        inner = [argument for argument in arguments if argument is not type(None)]
        return None if data is None and len(inner) < len(arguments) else _value(inner[0], data, path)
    if origin in (tuple, list):
        if not isinstance(data, (list, tuple)):
            raise _mistyped(path, data, "a list")
        return origin(_value(arguments[0], item, f"{path}[{index}]") for index, item in enumerate(data))
    if origin is dict:
        if not isinstance(data, Mapping):
            raise _mistyped(path, data, "an object")
        return {str(key): _value(arguments[1], item, f"{path}.{key}") for key, item in data.items()}
    if is_dataclass(hint):
        return decode(cast(type, hint), data, path)
    return _scalar(hint, data, path)


def _scalar(kind: type, data: Any, path: str) -> Any:
    if kind is float and isinstance(data, (int, float)) and not isinstance(data, bool):
        if not math.isfinite(data):
            raise _mistyped(path, data, "a finite number")
        return float(data)
    if not isinstance(data, kind) or (isinstance(data, bool) and kind is not bool):
        raise _mistyped(
            path, data, {int: "a whole number", float: "a number", str: "a text", bool: "true or false"}.get(kind, kind.__name__)
        )
    return data


def _mistyped(path: str, data: Any, expected: str) -> ValueError:
    shown = repr(data)
    return ValueError(f"{path} is {shown if len(shown) < 80 else shown[:80] + '...'}, not {expected}")


def set_aside(path: Path, reason: object) -> str:
    """Rename a damaged file to NAME.damaged (replacing an older one), so that it is written again; returns a sentence that says so.

    OSError where it cannot be renamed.
    """
    lines = str(reason).strip().splitlines()
    aside = path.with_name(path.name + ".damaged")
    path.replace(aside)
    return f"{path} is damaged ({lines[0] if lines else 'unreadable'}): set aside as {aside.name} and made again"
