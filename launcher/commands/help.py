"""`efflaunch train --help`: every experiment, group, option and key, read from conf/ and the dataclasses themselves."""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Iterator
from dataclasses import MISSING, Field, fields, is_dataclass
from enum import Enum
from typing import Any, cast, get_type_hints

from ...utils.ranges import ranges_of
from ..config.conf_groups import EXPERIMENT, GROUPS, first_comment, option_file, options
from ..config.run_config import Config
from ..config.schema import describe_type


def train_help(usage: str, config_dir: str | None = None) -> str:
    """The whole help screen."""
    parts = [
        usage.rstrip(),
        "",
        "experiments (+experiment=NAME):",
        *_options(EXPERIMENT, config_dir),
        "",
        "groups (GROUP=OPTION):",
        *(line for group in GROUPS for line in (f"  {group}", *_options(group, config_dir, indent=4))),
        "",
        "keys (KEY=VALUE); sizes read 8K, 1M, 80GiB, durations 90, 15m, 4h:",
        *keys_help(),
    ]
    return "\n".join(parts)


def _options(group: str, config_dir: str | None, indent: int = 2) -> Iterator[str]:
    names = options(group, config_dir)
    width = max(map(len, names), default=0)
    for name in names:
        yield f"{' ' * indent}{name:<{width}}  {first_comment(option_file(group, name, config_dir))}"


def keys_help(kind: type = Config, path: str = "") -> Iterator[str]:
    """Two lines a key: name, type and default; what it means. Groups in order, their own line first."""
    hints = get_type_hints(kind, include_extras=True)
    meanings, allowed = field_docs(kind), ranges_of(kind)
    for field in fields(kind):
        key, hint = f"{path}{field.name}", hints[field.name]
        if is_dataclass(hint):
            yield f"\n  {key}: {(inspect.getdoc(cast(type, hint)) or '').splitlines()[0]}"
            yield from keys_help(cast(type, hint), f"{key}.")
        else:
            accepted = f"; {allowed[field.name]}" if field.name in allowed else ""
            yield f"    {key:<34} {describe_type(hint)}{_default(field)}{accepted}"
            yield from textwrap.wrap(meanings.get(field.name, ""), 110, initial_indent=" " * 8, subsequent_indent=" " * 8)


def _default(field: Field[Any]) -> str:
    if field.default is not MISSING:
        value = field.default.value if isinstance(field.default, Enum) else field.default
        return f" = {'null' if value is None else str(value).lower() if isinstance(value, bool) else value}"
    if field.default_factory is not MISSING:
        return f" = {field.default_factory()}"
    return ""


def field_docs(kind: type) -> dict[str, str]:
    """The text under each field of a dataclass, from its source."""
    body = cast(ast.ClassDef, ast.parse(textwrap.dedent(inspect.getsource(kind))).body[0]).body
    docs = {}
    for field, text in zip(body, body[1:], strict=False):
        is_text = isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant) and isinstance(text.value.value, str)
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and is_text:
            written = " ".join(str(cast(ast.Constant, cast(ast.Expr, text).value).value).split())
            docs[field.target.id] = written.replace("None:", "null:")
    return docs
