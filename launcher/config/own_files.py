"""Configuration files of the user's own directory (--config-dir), read strictly before Hydra composes them. Pure but for reading.

Hydra would follow a file into unbounded recursion or expansion, raise the YAML library's own errors, and ignore what it does not
look for; here each of these is a ConfigError with file and line.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ...errors import ConfigError
from .conf_groups import EXPERIMENT, GROUPS, conf_dir

MAX_BYTES = 1 << 20
MAX_DEPTH = 50
MAX_NODES = 100_000
"""Values of a file with its aliases expanded."""
MAX_DIGITS = 40
_HYDRA = "hydra"
_ENDING = re.compile(r"\.ya?ml", re.IGNORECASE)
_PLAIN_TAGS = tuple(f"tag:yaml.org,2002:{name}" for name in ("str", "int", "float", "bool", "null", "seq", "map", "merge"))


def check_own_files(config_dir: str, chosen: list[str]) -> list[Path]:
    """The files of `config_dir` that may take part; ConfigError for files that would be ignored, and for used ones that are no options.

    `chosen`: option names typed on the command line; what they and the shipped files name in their defaults counts as used.
    """
    folder = Path(config_dir)
    _check_places(folder)
    shipped = [path.stem for path in conf_dir().rglob("*.yaml")]
    used = []
    for path, data in _used(folder, [*chosen, *shipped]):
        _check_contents(path, folder, data)
        used.append(path)
    return used


def _check_places(folder: Path) -> None:
    """Raise ConfigError where a file that looks like configuration lies where it is not read."""
    for name in ("config.yaml", "config.yml"):
        if (folder / name).is_file():
            hint = f"move what it sets to {folder}/experiment/NAME.yaml, with `# @package _global_` on top, and type +experiment=NAME"
            raise ConfigError(
                str(folder / name), found="a main configuration file", expected="options only: DIR/GROUP/NAME.yaml", hint=hint
            )
    group_names = (*GROUPS, EXPERIMENT)
    for path in sorted(folder.iterdir()):
        if _ENDING.fullmatch(path.suffix) and path.stem in group_names and not path.is_dir():
            hint = f"mv {path} {folder / path.stem}/NAME.yaml, and type {path.stem}=NAME"
            raise ConfigError(str(path), found="a file beside the groups", expected="DIR/GROUP/NAME.yaml", hint=hint)
    for inner in sorted(path for path in folder.iterdir() if path.is_dir()):
        files = sorted(path for path in inner.iterdir() if _ENDING.fullmatch(path.suffix))
        if not files:
            continue
        if inner.name == _HYDRA:
            raise not_hydras(str(inner))
        near = difflib.get_close_matches(inner.name, group_names, 1, 0.8)
        if inner.name not in group_names and near:
            raise ConfigError(
                str(inner), found="a folder of no group", expected=f"one of {', '.join(group_names)}", hint=f"mv {inner} {folder / near[0]}"
            )
        if inner.name in group_names:
            _check_files(files)


def _check_files(files: list[Path]) -> None:
    """Raise ConfigError for files of a group that no option could be read from."""
    for path in files:
        if path.suffix != ".yaml":
            hint = f"mv {path} {path.with_suffix('.yaml')}"
            raise ConfigError(str(path), found=f"the ending {path.suffix}", expected=".yaml", hint=hint)
        if path.is_symlink() and not path.exists():
            hint = f"rm {path}, or link what is there"
            raise ConfigError(str(path), found=f"a link to {path.readlink()}, which is not there", expected="a file", hint=hint)


def _used(folder: Path, names: list[str]) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Each file that may take part, with its contents: those of the given names, and of the names in their defaults lists."""
    files = [path for group in (*GROUPS, EXPERIMENT) for path in sorted((folder / group).rglob("*.yaml"))]
    wanted, seen = set(names), set[Path]()
    while new := [path for path in files if path.stem in wanted and path not in seen]:
        for path in new:
            seen.add(path)
            data = read_own_file(path)
            wanted |= {Path(name).name for name in _names_in(data.get("defaults"))}
            yield path, data


def read_own_file(path: Path) -> dict[str, Any]:
    """The mapping a configuration file holds; ConfigError with file and line for what is none."""
    import yaml

    try:
        data = path.read_bytes()
        text = data.decode("utf-8-sig")
    except OSError as error:
        raise _wrong(path, 0, error.strerror or type(error).__name__, "a file that can be read") from error
    except UnicodeDecodeError as error:
        raise _wrong(path, data.count(b"\n", 0, error.start) + 1, "bytes that are no UTF-8", "text in UTF-8") from error
    if len(data) > MAX_BYTES:
        raise _wrong(path, 0, f"{len(data):,} bytes", f"at most {MAX_BYTES:,}")
    try:
        _check_events(path, yaml.parse(text, Loader=yaml.SafeLoader))
        _check_keys(path, yaml.compose(text, Loader=yaml.SafeLoader))
        loaded = yaml.safe_load(text)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        raise _wrong(path, mark.line + 1 if mark else 0, f"{error.problem or error.context}", "YAML") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise _wrong(path, 0, str(error).splitlines()[0], "YAML") from error
    if loaded is not None and not isinstance(loaded, dict):
        raise _wrong(path, 1, f"a {type(loaded).__name__}", "`key: value` lines")
    return loaded or {}


def _check_events(path: Path, events: Iterator[Any]) -> None:
    """ConfigError for nesting, expansion and values that a configuration has no use for. Reads events, so that nothing is built."""
    import yaml

    sizes: dict[str, int] = {}
    open_nodes: list[list[Any]] = []
    total = 0
    for event in events:
        line = event.start_mark.line + 1
        if isinstance(event, (yaml.MappingStartEvent, yaml.SequenceStartEvent)):
            open_nodes.append([event.anchor, 1])
            if len(open_nodes) > MAX_DEPTH:
                raise _wrong(path, line, f"groups more than {MAX_DEPTH} deep", "fewer")
            _check_tag(path, line, event.tag)
            continue
        if isinstance(event, (yaml.MappingEndEvent, yaml.SequenceEndEvent)):
            anchor, size = open_nodes.pop()
        elif isinstance(event, yaml.AliasEvent):
            if event.anchor not in sizes:
                raise _wrong(path, line, f"the alias *{event.anchor}, which is undefined here or inside itself", "values")
            anchor, size = None, sizes[event.anchor]
        elif isinstance(event, yaml.ScalarEvent):
            _check_scalar(path, line, event)
            anchor, size = event.anchor, 1
        else:
            continue
        if anchor:
            sizes[anchor] = size
        if open_nodes:
            open_nodes[-1][1] += size
        total = max(total, size, open_nodes[-1][1] if open_nodes else 0)
        if total > MAX_NODES:
            raise _wrong(path, line, f"more than {MAX_NODES:,} values, with aliases expanded", "fewer")


def _check_scalar(path: Path, line: int, event: Any) -> None:
    import yaml

    _check_tag(path, line, event.tag)
    if event.implicit[0] and event.tag is None:
        resolved = yaml.SafeLoader("").resolve(yaml.ScalarNode, event.value, (True, False))
        if resolved.endswith(":timestamp"):
            raise _wrong(path, line, f"the date {event.value}", f"a text or a number: quote it, '{event.value}'")
        if resolved.endswith(":int") and len(event.value) > MAX_DIGITS:
            raise _wrong(path, line, f"a number of {len(event.value)} digits", f"at most {MAX_DIGITS}")


def _check_keys(path: Path, node: Any) -> None:
    """ConfigError for a key that is given twice in one group."""
    import yaml

    children = node.value if isinstance(node, yaml.CollectionNode) else []
    if isinstance(node, yaml.MappingNode):
        seen: dict[str, int] = {}
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                if key.value in seen:
                    raise _wrong(path, key.start_mark.line + 1, f"{key.value} again, after line {seen[key.value]}", "each key once")
                seen[key.value] = key.start_mark.line + 1
        children = [value for _, value in node.value]
    for child in children:
        _check_keys(path, child)


def _check_tag(path: Path, line: int, tag: str | None) -> None:
    if tag not in (None, "!", *_PLAIN_TAGS):
        raise _wrong(path, line, f"the tag {tag}", "plain values")


def _check_contents(path: Path, folder: Path, data: dict[str, Any]) -> None:
    defaults, group = data.get("defaults"), path.relative_to(folder).parts[0]
    if defaults is not None and not _is_defaults_list(defaults):
        expected = "a list of options, as `- tiny` or `- override /model: tiny`"
        raise _wrong(path, 0, f"the defaults {defaults!r}"[:200], expected)
    for name in _names_in(defaults):
        if name.lstrip("/").partition("/")[0] == _HYDRA:
            raise not_hydras(str(path))
        if name in (path.stem, f"/{group}/{path.stem}"):
            hint = f"another name, as {path.with_name('my_' + path.name)}, with `defaults: [{path.stem}]`"
            raise ConfigError(f"file {path}", found="itself in its defaults list", expected="another option to start from", hint=hint)
    if _HYDRA in data and (group == EXPERIMENT or "@package _global_" in path.read_text(encoding="utf-8").partition("\n")[0]):
        raise not_hydras(str(path))
    odd = next((key for key in data if not isinstance(key, str)), None)
    if odd is not None:
        raise _wrong(path, 0, f"the key {odd!r}", "keys that are texts")


def _is_defaults_list(defaults: Any) -> bool:
    if not isinstance(defaults, list):
        return False
    for item in defaults:
        if isinstance(item, dict) and len(item) == 1:
            ((key, value),) = item.items()
            options = value if isinstance(value, list) else [value]
            if not isinstance(key, str) or not all(option is None or isinstance(option, str) for option in options):
                return False
        elif not isinstance(item, str):
            return False
    return True


def _names_in(defaults: Any) -> Iterator[str]:
    """Every option or group a defaults list names."""
    for item in defaults if isinstance(defaults, list) else ():
        if isinstance(item, str):
            yield item
        elif isinstance(item, dict):
            for key, value in item.items():
                yield str(key).removeprefix("optional ").removeprefix("override ").removeprefix("optional ").partition("@")[0]
                yield from (str(option) for option in (value if isinstance(value, list) else [value]) if option is not None)


def not_hydras(where: str) -> ConfigError:
    """The error for a setting of Hydra itself, which efflaunch uses to compose and for nothing else."""
    hint = "run.root=DIR run.id=NAME say where a run goes; --config-dir DIR adds your own files"
    return ConfigError(where, found="a setting of Hydra", expected="keys of efflaunch: Hydra only composes them here", hint=hint)


def _wrong(path: Path, line: int, problem: str, expected: str) -> ConfigError:
    where = f"file {path}, line {line}" if line else f"file {path}"
    return ConfigError(where, found=problem, expected=expected, hint=f"mend {path}, or choose another option")
