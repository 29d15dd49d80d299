"""Files of the user's own directory that hold old names of renamed keys (aliases.py), rewritten for Hydra. Pure but for reading.

A file is rewritten as text, at the places where YAML has a key or an interpolation: its `# @package` line, anchors and quotes stay.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .aliases import RENAMED, check_both, current_key, current_references, notify, old_references
from .own_files import check_own_files

_PACKAGE = re.compile(r"#\s*@package\s+(\S+)")
_MERGE = "tag:yaml.org,2002:merge"


def current_own_files(config_dir: str, chosen: list[str]) -> dict[str, str]:
    """Texts of the used files that hold an old name, with the new one, by their path in `config_dir`; a notice for each.

    ConfigError as check_own_files', and for a file with both names of a key.
    """
    rewritten = {}
    for path in check_own_files(config_dir, chosen):
        text = path.read_text(encoding="utf-8-sig")
        name = str(path.relative_to(config_dir))
        # Composing is slow, and nearly no file has an old name.
        if any(old.partition(".")[2] in text for old in RENAMED):
            new = _current_text(text, package_of(text, name), str(path))
            if new != text:
                rewritten[name] = new
    return rewritten


def package_of(text: str, name: str) -> str:
    """The key that a file's contents stand under: its group's, or what its `# @package` line names; empty for the root."""
    for line in text.splitlines():
        if line.strip() and not line.lstrip().startswith("#"):
            break
        named = _PACKAGE.search(line)
        if named is not None:
            return "" if named[1] == "_global_" else named[1]
    return ".".join(Path(name).parent.parts)


def _current_text(text: str, package: str, where: str) -> str:
    """The text of a file with each old key under its new name. ConfigError where one mapping has both."""
    import yaml

    used: list[str] = []
    changes: dict[int, tuple[int, str]] = {}
    for key, node in _scalars(yaml.compose(text, Loader=yaml.SafeLoader), package, where):
        start, end = node.start_mark.index, node.end_mark.index
        if key is None:
            used += old_references(node.value)
            new = current_references(text[start:end])
        else:
            used += [key] if key in RENAMED else []
            new = text[start:end].replace(key.rpartition(".")[2], current_key(key).rpartition(".")[2])
        if new != text[start:end]:
            changes[start] = (end, new)
    notify(used, where)
    # From the end, so that the marks before stay right.
    for start in sorted(changes, reverse=True):
        end, new = changes[start]
        text = text[:start] + new + text[end:]
    return text


def _scalars(node: Any, path: str, where: str) -> Iterator[tuple[str | None, Any]]:
    """Every scalar of a document: keys with their dotted path, values with None."""
    import yaml

    if isinstance(node, yaml.ScalarNode):
        yield None, node
    elif isinstance(node, yaml.SequenceNode):
        for item in node.value:
            yield from _scalars(item, path, where)
    elif isinstance(node, yaml.MappingNode):
        keys = [_join(path, str(key.value)) for key, _ in node.value]
        check_both(keys, f"file {where}, line {node.start_mark.line + 1}")
        for key, (name, value) in zip(keys, node.value, strict=True):
            merged = name.tag == _MERGE
            if not merged:
                yield key, name
            yield from _scalars(value, path if merged else key, where)


def _join(path: str, key: str) -> str:
    return f"{path}.{key}" if path else key
