"""Names that reach a shell, a scheduler or a path: one rule for identifiers, one for values and paths. Pure but for `inside`."""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ..errors import ConfigError

MAX_IDENTIFIER = 128
"""Room for what a scheduler, a file name of 255 bytes and the index of an array put around it."""
_IDENTIFIER = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_LINE_BREAKERS = ("Cc", "Cs", "Zl", "Zp")
"""Unicode categories: control characters, halves of characters, separators of lines and paragraphs."""
_HASH_DIGITS = 8
_FOLDER = re.compile(r"[^/\0]+")


def check_identifier(key: str, name: str) -> None:
    """ConfigError unless `name` is one path component that needs no quotes anywhere: letters, digits, `.`, `_` and `-`."""
    fits = len(name) <= MAX_IDENTIFIER and _IDENTIFIER.fullmatch(name) is not None and ".." not in name
    if not fits:
        shown = f"{name!r}" if len(name) <= MAX_IDENTIFIER else f"{len(name)} characters, {name[:20]!r}..."
        expected = f"up to {MAX_IDENTIFIER} letters, digits, '.', '_' and '-', without '..', a letter or digit first"
        raise ConfigError(key, found=shown, expected=expected, hint=f"{key}=my-run-1")


def as_identifier(text: str) -> str:
    """The nearest identifier; a long one is cut, with a hash of the whole, so that two that differ stay apart."""
    name = re.sub(r"\.{2,}", ".", re.sub(r"[^A-Za-z0-9._-]+", "_", text)).lstrip("._-") or "run"
    if len(name) <= MAX_IDENTIFIER:
        return name
    mark = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:_HASH_DIGITS]
    return f"{name[: MAX_IDENTIFIER - _HASH_DIGITS - 1]}-{mark}"


def check_text(key: str, text: str) -> None:
    """ConfigError for a value with a newline or another control character: it would be more than one line of a script."""
    for character in text:
        if unicodedata.category(character) in _LINE_BREAKERS:
            raise ConfigError(
                key,
                found=f"the character {character!r} in {text[:60]!r}",
                expected="one line without control characters: it becomes part of scripts, paths and messages",
                hint=f"{key}=... without it",
            )


def check_path(key: str, path: str | Path) -> None:
    """check_text, and not empty: an empty path means the current directory to most libraries."""
    check_text(key, str(path))
    if not str(path).strip():
        raise ConfigError(key, found=f"{str(path)!r}", expected="a path", hint=f"{key}=DIRECTORY")


def texts_of(data: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """(dotted key, text) of every text in nested mappings and lists; a mapping's own keys too."""
    if isinstance(data, Mapping):
        for key, value in data.items():
            inner = f"{path}.{key}" if path else str(key)
            yield path or str(key), str(key)
            yield from texts_of(value, inner)
    elif isinstance(data, (list, tuple)):
        for index, value in enumerate(data):
            yield from texts_of(value, f"{path}[{index}]")
    elif isinstance(data, str):
        yield path, data


def is_file_name(name: str) -> bool:
    """Return whether `name` is that of something directly inside a folder: no separator, not `.` or `..`, not empty."""
    return _FOLDER.fullmatch(name) is not None and name not in (".", "..")


def inside(folder: Path, name: str) -> Path:
    """`folder`/`name`; ValueError where that is outside of the folder, by `..`, an absolute path or a link."""
    path = folder / name
    if "\0" in name or Path(name).is_absolute() or not path.resolve().is_relative_to(folder.resolve()):
        raise ValueError(f"{name!r} leads out of {folder}")
    return path
