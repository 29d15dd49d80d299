"""Renamed configuration keys: their old names stay accepted for one version, wherever a person writes a key.

Typed keys and the user's own files get the new name before Hydra composes, with a notice; run directories of before are read
without one, since efflaunch wrote them. Nothing after this file knows an old name. Pure but for the notice.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from types import MappingProxyType
from typing import Any

from ...errors import ConfigError

RENAMED: Mapping[str, str] = MappingProxyType(
    {
        "launcher.hang_long_s": "launcher.hang_startup_s",
        "parallel.plan_patience_s": "parallel.plan_timeout_s",
        "checkpoint.while_flushing": "checkpoint.on_busy",
        "optim.states": "optim.state_device",
    }
)
"""Old key to new key; both are of the same group."""

REMOVED: Mapping[str, str] = MappingProxyType(
    {"cluster.efficiency": "cluster.gemm_efficiency for products, and cluster.gpu or cluster.attention_efficiency for attention"}
)
"""Keys that are gone, and what took their place."""

# Backslashes before `${` make it plain text where they are odd in number; those are left alone.
_REFERENCE = re.compile(r"(?<!\\)((?:\\\\)*\$\{\s*)(" + "|".join(re.escape(key) for key in RENAMED) + r")(?=\s*\})")


def current_key(key: str) -> str:
    """The key's name of this version."""
    return RENAMED.get(key, key)


def current_references(text: str) -> str:
    """A value with its interpolations, as `${optim.states}`, under the names of this version."""
    return _REFERENCE.sub(lambda match: match[1] + RENAMED[match[2]], text)


def old_references(text: str) -> list[str]:
    """Old names that the interpolations of a value use."""
    return [match[2] for match in _REFERENCE.finditer(text)]


def current_data(data: Any, where: str) -> Any:
    """A whole configuration, as run.yaml holds it, under the names of this version. ConfigError where it has both names of a key.

    What is no mapping is returned as it is, for load_config to refuse.
    """
    if not isinstance(data, Mapping):
        return data
    result = dict(data)
    model = result.get("model")
    if isinstance(model, Mapping) and model.get("tie_embeddings") is False:
        # Until it could be null, false was the default and said nothing of a model with a path.
        result["model"] = {**model, "tie_embeddings": None}
    cluster = result.get("cluster")
    if isinstance(cluster, Mapping) and "efficiency" in cluster:
        # Runs of before took one share for products and attention, and planned into all of a device.
        both = {"gemm_efficiency": cluster["efficiency"], "attention_efficiency": cluster["efficiency"]}
        result["cluster"] = {key: value for key, value in cluster.items() if key != "efficiency"} | both
        result["cluster"].setdefault("reserve", 0.0)
    for old in RENAMED:
        group, name = old.split(".")
        values = result.get(group)
        if isinstance(values, Mapping) and name in values:
            check_both([old, *(f"{group}.{key}" for key in values)], where)
            # The order of keys is kept, so that what is printed or written again is where it was.
            result[group] = {current_key(f"{group}.{key}").partition(".")[2]: value for key, value in values.items()}
    return result


def check_both(keys: Iterable[str], where: str) -> None:
    """ConfigError where `keys`, all of one command line or file, have the old and the new name of the same key."""
    given = set(keys)
    for old, new in RENAMED.items():
        if old in given and new in given:
            hint = f"{new}=... alone: {old} is its old name"
            raise ConfigError(where, found=f"{old} and {new}", expected="one name of the same key", hint=hint)


def notify(old_keys: Iterable[str], where: str = "") -> None:
    """Print one line on stderr for each old name in use; `where`: the file that holds it, unless it was typed."""
    for line in notice_lines(old_keys, where):
        print(line, file=sys.stderr, flush=True)


def notice_lines(old_keys: Iterable[str], where: str = "") -> Iterator[str]:
    """What `notify` prints, each key once."""
    for old in dict.fromkeys(old_keys):
        place = f"file {where}: " if where else ""
        yield f"efflaunch: {place}{old} is now {RENAMED[old]}; the old name is accepted in this version and goes with the next"
