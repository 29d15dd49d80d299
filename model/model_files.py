"""Finds a model's files: `model.path` as a local directory or a name on the hub, and its config.json. Imports no torch.

Note: a name is looked up on the hub only if it can be one (NAME or NAMESPACE/NAME), once, and only if it is no directory and no
snapshot of it is in the cache. Anything that looks like a path is a path.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from ..errors import ConfigError

LOOKUP_TIMEOUT_S = 10.0
"""Longest wait for the hub's answer to one question."""
MAX_CONFIG_BYTES = 10 << 20
"""A config.json is a few kilobytes; more is another file under its name."""
_HUB_NAME = re.compile(r"([A-Za-z0-9_][\w\-.]{0,95}/)?[A-Za-z0-9_][\w\-.]{0,95}", re.ASCII)


def is_hub_name(path: str) -> bool:
    """Whether the hub could know a model of this name, by its own rules for names."""
    legal = _HUB_NAME.fullmatch(path) is not None and "--" not in path and ".." not in path
    return legal and path[-1] not in "-." and not path.endswith(".git")


def local_folder(path: str) -> Path | None:
    """The directory that `model.path` is, or None where it can only be a hub name. ConfigError where it is neither."""
    folder = Path(path).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists():
        raise _no_model(path, "a file", "a directory with config.json and *.safetensors in it", f"model.path={folder.parent}")
    if not is_hub_name(path) or path.startswith("~"):
        raise _no_model(
            path,
            f"no such directory ({folder.absolute()})",
            "a directory with config.json and *.safetensors, or a hub name (NAMESPACE/NAME)",
            "model.path=DIRECTORY",
        )
    return None


def model_folder(path: str) -> Path:
    """The directory that holds config.json: `model.path` itself, or the hub's snapshot, of which only config.json need be here."""
    return local_folder(path) or _hub_snapshot(path)


def read_config_json(path: str) -> dict[str, Any]:
    """The config.json of a local directory or of a hub name; ConfigError when there is none to read."""
    file = model_folder(path) / "config.json"
    try:
        if file.stat().st_size > MAX_CONFIG_BYTES:
            raise ValueError(f"{file.stat().st_size} bytes long")
        config = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise _no_model(
            path,
            f"no readable config.json ({error})",
            "a Hugging Face model directory",
            "model.path=DIRECTORY with config.json and *.safetensors in it",
        ) from error
    if not isinstance(config, dict):
        raise _no_model(path, "a config.json that is no object", "a Hugging Face config", "check model.path")
    return config


def _hub_snapshot(name: str) -> Path:
    """The cached snapshot, or what one question to the hub brings."""
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        return Path(huggingface_hub.hf_hub_download(name, "config.json", local_files_only=True)).parent
    except LocalEntryNotFoundError:
        pass
    try:
        # Asked first because downloads retry what this does not.
        huggingface_hub.HfApi().model_info(name, timeout=LOOKUP_TIMEOUT_S)
        return Path(huggingface_hub.hf_hub_download(name, "config.json")).parent
    except Exception as error:  # errors of the hub and of its HTTP library have no base of their own
        answer = " ".join(str(error).split())[:300] or type(error).__name__
        raise _no_model(
            name,
            f"no directory {Path(name).absolute()}, and as a hub name: {answer}",
            "a directory with config.json and *.safetensors, or a cached or reachable hub model",
            "model.path=DIRECTORY, or download the model on a machine with a network first",
        ) from error


def _no_model(path: str, actual: str, expected: str, hint: str) -> ConfigError:
    return ConfigError(f"model.path {path}", found=actual, expected=expected, hint=hint)
