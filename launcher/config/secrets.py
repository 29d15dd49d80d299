"""Secrets stay in the environment: what a configuration must not hold, and what is taken out of a text. Pure.

run.yaml, batch scripts, job names, W&B and process arguments repeat the configuration, so a key or token in it would be in all
of them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from ...errors import ConfigError

_MIN_LENGTH = 8
"""Shorter values are no secrets, and occur by chance."""
_NAME = re.compile(r"(?:KEY|SECRET|PASSWORD|PASSWD|CREDENTIAL|TOKEN(?!IZ))", re.IGNORECASE)
_NO_SECRET = re.compile(r"(?:_(?:PATH|FILE|DIR|URL|NAME|ID)|^GPG_KEY|^SSH_AUTH_SOCK)$", re.IGNORECASE)
_SPECIAL = "".join(f"(?<!{name}_)" for name in ("pad", "bos", "eos", "unk", "sep", "cls", "mask"))
"""Tokens of a tokenizer."""
_ASSIGNED = re.compile(
    rf"\b(\w*(?:_KEY|APIKEY|SECRET\w*|PASSWORD|PASSWD|{_SPECIAL}TOKEN))\s*[=:]\s*(['\"]?)([^\s'\"$<`][^\s'\"]{{7,}})\2", re.IGNORECASE
)
_SHAPES = {
    "a Hugging Face token": r"\bhf_[A-Za-z0-9]{20,}",
    "a W&B key": r"\bwandb_v\d_[A-Za-z0-9_]{20,}",
    "a GitHub token": r"\b(?:gh[pousr]_[A-Za-z0-9]{30,}|github_pat_[A-Za-z0-9_]{30,})",
    "an API key": r"\bsk-[A-Za-z0-9_-]{20,}",
    "an AWS key": r"\b(?:AKIA|ASIA)[A-Z0-9]{16}\b",
    "a private key": r"-----BEGIN [A-Z ]*PRIVATE KEY-----",
    "a password in an address": r"://[^/\s:@]+:[^/\s:@$]+@",
}


def is_secret_name(name: str) -> bool:
    """Whether an environment variable of this name holds a secret: WANDB_API_KEY, HF_TOKEN, ..."""
    return bool(_NAME.search(name)) and not _NO_SECRET.search(name)


def secrets_of(environment: Mapping[str, str]) -> dict[str, str]:
    """The variables that hold secrets, by name. A path is none."""
    return {
        name: value
        for name, value in environment.items()
        if is_secret_name(name) and len(value) >= _MIN_LENGTH and not value.startswith(("/", "~"))
    }


def redact(text: str, secrets: Mapping[str, str]) -> str:
    """`text` with every secret's value replaced by the name of its variable."""
    for name, value in sorted(secrets.items(), key=lambda item: -len(item[1])):
        text = text.replace(value, f"<{name}>")
    return text


def check_secrets(data: Mapping[str, Any], secrets: Mapping[str, str]) -> None:
    """ConfigError, which does not repeat it, for a value that is, holds or looks like a secret. `data`: the plain configuration."""
    for key, text in _texts(data, ""):
        found = find_secret(text, secrets)
        if found is not None:
            raise ConfigError(
                key,
                found=f"what looks like {found}; run.yaml and batch scripts would show it",
                expected="no secret in the configuration",
                hint="export it where efflaunch (on Ray: its nodes) is started, export WANDB_API_KEY=...; ranks inherit it",
            )


def find_secret(text: str, secrets: Mapping[str, str]) -> str | None:
    """What secret the text holds, in words that do not repeat it."""
    for name, value in secrets.items():
        if value in text:
            return f"the value of {name} in the environment"
    for what, shape in _SHAPES.items():
        if re.search(shape, text):
            return what
    assigned = _ASSIGNED.search(text)
    return f"a value for {assigned[1]}" if assigned else None


def _texts(data: Any, path: str) -> Iterator[tuple[str, str]]:
    """Every text of nested mappings and lists with its dotted key; texts among keys too."""
    if isinstance(data, Mapping):
        for key, value in data.items():
            inner = f"{path}.{key}" if path else str(key)
            yield inner, f"{key}={value}" if isinstance(value, str) else str(key)
            yield from _texts(value, inner)
    elif isinstance(data, (list, tuple)):
        for index, value in enumerate(data):
            yield from _texts(value, f"{path}[{index}]")
    elif isinstance(data, str):
        yield path, data
