"""Paths among the values of a configuration: which keys hold them, what `~` means, and where relative ones start.

A run's paths are made absolute when the run is made, so that every later command works from any directory. Nothing is read;
whether a name is a file here or a hub's is decided by looking whether the file exists.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from enum import Enum
from pathlib import Path
from types import MappingProxyType
from typing import Any

from ...errors import ConfigError
from ...training.data.config import SourceConfig
from .run_config import Backend, Config


class PathKind(Enum):
    """Kinds of value that a path key takes: what else than a path it may be."""

    FILE = "a file or directory"
    NAME = "a file, a directory or a hub name"
    ADDRESS = "a directory or an address with a protocol, as s3://bucket/run"
    COMMAND = "a program, by its name or its path"


PATH_KEYS: Mapping[str, PathKind] = MappingProxyType(
    {
        "run.root": PathKind.FILE,
        "model.path": PathKind.NAME,
        "adapter.init": PathKind.FILE,
        "data.prefixes": PathKind.FILE,
        "data.sources": PathKind.FILE,
        "data.tokenizer": PathKind.NAME,
        "data.cache_dir": PathKind.FILE,
        "eval.corpora": PathKind.FILE,
        "parallel.profile": PathKind.FILE,
        "engine.config": PathKind.FILE,
        "memory.offload_dir": PathKind.FILE,
        "checkpoint.mirror": PathKind.ADDRESS,
        "launcher.slurm.python": PathKind.COMMAND,
        "launcher.ray.code": PathKind.FILE,
        "launcher.ray.work_dir": PathKind.FILE,
        "launcher.ray.python": PathKind.COMMAND,
    }
)
"""Every key whose value is a path or may be one."""

_OF_THE_SUBMITTER = ("run.root", "engine.config", "launcher.ray.code", "launcher.ray.work_dir")
"""Paths that start where the command is typed, whatever launcher.ray.work_dir says."""

# Quoted parts are matched first, and kept: `~` at the beginning of a value or of an item of a list is the home directory.
_HOME = re.compile(r"""'(?:\\.|[^'\\])*'|"(?:\\.|[^"\\])*"|(?<![^\[,\s])(~[\w.-]*)(?=[/,\]\s]|$)""")


def expand_home(key: str, text: str) -> str:
    """The text of `key=text` with `~` and `~user` written out where the key holds paths. ConfigError for an unknown user."""
    if key not in PATH_KEYS and not key.startswith("data.sources."):
        return text
    return _HOME.sub(lambda match: match[0] if match[1] is None else _home(key, match[1]), text)


def expand_homes(config: Config) -> Config:
    """`config` with `~` written out in every path, also in those of files. ConfigError for an unknown user."""
    return _mapped(config, lambda key, _kind, value: _home(key, value) if value.startswith("~") else value)


def absolute_paths(config: Config, base: Path | None = None) -> Config:
    """`config` with relative paths made absolute from `base` (None: the working directory).

    On Ray, paths that the nodes read start in launcher.ray.work_dir where that is given. A model or a tokenizer that is no file
    there stays as it is: it may be a hub's.
    """
    here = Path.cwd() if base is None else base
    work_dir = config.launcher.ray.work_dir if config.launcher.backend is Backend.RAY else None
    there = here / work_dir if work_dir else here

    def absolute(key: str, kind: PathKind, value: str) -> str:
        start = here if key in _OF_THE_SUBMITTER else there
        return value if _is_name(kind, value, start) else str(start / value)

    return _mapped(config, absolute)


def _is_name(kind: PathKind, value: str, start: Path) -> bool:
    """Return whether the value is a name and no path: a hub's, a program's, or an address with a protocol."""
    if kind is PathKind.ADDRESS:
        return "://" in value
    if kind is PathKind.COMMAND:
        return "/" not in value
    return kind is PathKind.NAME and not value.startswith((".", "/")) and not (start / value).exists()


def _home(key: str, value: str) -> str:
    expanded = os.path.expanduser(value)
    if expanded.startswith("~"):
        user = value.partition("/")[0]
        raise ConfigError(key, found=f"{value}, and no user {user[1:]} on this machine", expected="a path", hint=f"{key}=/the/whole/path")
    return expanded


def _mapped(config: Config, change: Callable[[str, PathKind, str], str]) -> Config:
    for key, kind in PATH_KEYS.items():
        config = _with(config, key.split("."), lambda value, key=key, kind=kind: change(key, kind, value))  # type: ignore[misc]
    return config


def _with(group: Any, names: list[str], change: Callable[[str], str]) -> Any:
    """`group` (a dataclass) with the text, or every text of the list or mapping, at `names` replaced; of sources, their prefixes."""
    name, *rest = names
    value = getattr(group, name)
    if rest:
        return replace(group, **{name: _with(value, rest, change)})
    if isinstance(value, list):
        return replace(group, **{name: [change(item) if item else item for item in value]})
    if isinstance(value, dict):
        return replace(group, **{name: {key: _item(item, change) for key, item in value.items()}})
    return group if not value else replace(group, **{name: change(value)})


def _item(item: Any, change: Callable[[str], str]) -> Any:
    return _with(item, ["prefixes"], change) if isinstance(item, SourceConfig) else change(item) if item else item
