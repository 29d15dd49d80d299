"""Secrets stay in the environment: what a configuration must not hold, and what is taken out of a text. Pure.

run.yaml, batch scripts, job names, W&B and process arguments repeat the configuration, so a key or token in it would be in all
of them.
"""

from __future__ import annotations

import math
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
    "an AWS key": r"\b(?:AKIA|ASIA|AGPA|AROA|AIPA|ANPA)[A-Z0-9]{16}\b",
    "a Slack token": r"\bxox[abeoprs]-[A-Za-z0-9-]{10,}|\bxapp-\d-[A-Za-z0-9-]{10,}|hooks\.slack\.com/services/[A-Za-z0-9/]{20,}",
    "a GitLab token": r"\bgl(?:pat|dt|rt|ptt|oas|cbt)-[A-Za-z0-9_.-]{20,}",
    "a Google key": r"\bAIza[A-Za-z0-9_-]{35}|\bya29\.[A-Za-z0-9_-]{20,}|\bGOCSPX-[A-Za-z0-9_-]{20,}",
    "an npm or PyPI token": r"\bnpm_[A-Za-z0-9]{36}|\bpypi-[A-Za-z0-9_-]{40,}",
    "a Docker token": r"\bdckr_(?:pat|oat)_[A-Za-z0-9_-]{20,}",
    "a Stripe key": r"\b[rs]k_(?:live|test)_[A-Za-z0-9]{16,}",
    "a SendGrid key": r"\bSG\.[A-Za-z0-9_-]{16,}\.[A-Za-z0-9_-]{16,}",
    "an Azure key": r"\b(?:AccountKey|SharedAccessKey|sig)=[A-Za-z0-9+/%=]{30,}",
    "a JSON web token": r"\beyJ[A-Za-z0-9_-]{10,}\.eyJ[A-Za-z0-9_-]{10,}\.[A-Za-z0-9_-]*",
    "a bearer token": r"\b[Bb]earer\s+[A-Za-z0-9._~+/-]{20,}",
    "a private key": r"-----BEGIN [A-Z ]*PRIVATE KEY-----",
    "a password in an address": r"://[^/\s:@]+:[^/\s:@$]+@",
}


_HEX = re.compile(r"(?<![A-Za-z0-9_])(?:[0-9a-f]{64}|[0-9a-f]{40}|[0-9a-f]{32}|[0-9A-F]{64}|[0-9A-F]{40}|[0-9A-F]{32})(?![A-Za-z0-9_])")
_HEX_NAMED = re.compile(r"(?:/|@|sha\d*[:=-]|md5[:=-]|digest[:=-]|hash=|commit=|revision=|GPU-|MIG-)$", re.IGNORECASE)
"""Stands before hashes that name content: of a container, of a file of a hub's cache, of a commit."""
_IS_HEX = re.compile(r"[0-9a-f]+|[0-9A-F]+")
_WORD = re.compile(r"(?<![A-Za-z0-9/.@])[A-Za-z0-9]{24,}(?![A-Za-z0-9])")
_MIN_ENTROPY, _MIXED_CASE, _ONE_CASE, _DIGITS = 3.6, 0.45, 0.3, 3
"""Bits a character; shares of neighbours of different kinds; digits."""
_ONE_CASE_LENGTH = 32
"""Shorter ones of one case with digits are names of nodes and runs as well."""


def is_secret_name(name: str) -> bool:
    """Return whether an environment variable of this name holds a secret: WANDB_API_KEY, HF_TOKEN, ..."""
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
        secret = find_secret(text, secrets)
        if secret is not None:
            raise ConfigError(
                key,
                found=f"what looks like {secret}; run.yaml and batch scripts would show it",
                expected="no secret in the configuration",
                hint="export it where efflaunch (on Ray: its nodes) is started, export WANDB_API_KEY=...; ranks inherit it",
            )


def find_secret(text: str, secrets: Mapping[str, str]) -> str | None:
    """Describe the secret that the text holds without repeating it; None where it holds none."""
    for name, value in secrets.items():
        if value in text:
            return f"the value of {name} in the environment"
    for what, shape in _SHAPES.items():
        if re.search(shape, text):
            return what
    assigned = _ASSIGNED.search(text)
    if assigned:
        return f"a value for {assigned[1]}"
    return "a random token" if looks_random(text) else None


def looks_random(text: str) -> bool:
    """Return whether a word looks drawn at random, as tokens without a known beginning do: a hexadecimal one of 32, 40 or 64 digits, or
    one that mixes letters and digits more often than names do. Hashes named as such, and parts of paths and addresses, are none."""
    if any(_HEX_NAMED.search(text[: word.start()]) is None for word in _HEX.finditer(text)):
        return True
    return any(_mixes(word[0]) for word in _WORD.finditer(text) if not _IS_HEX.fullmatch(word[0]))


def _mixes(word: str) -> bool:
    kinds = ["d" if char.isdigit() else "u" if char.isupper() else "l" for char in word]
    if len(set(kinds)) < 2 or kinds.count("d") < _DIGITS:
        return False
    # Of characters drawn from 62, 62 of 100 neighbours are of different kinds, of lower case and digits 40; in CamelCase names 30 are.
    changes = sum(one != other for one, other in zip(kinds, kinds[1:], strict=False)) / (len(word) - 1)
    entropy = -sum(word.count(char) / len(word) * math.log2(word.count(char) / len(word)) for char in set(word))
    if len(set(kinds)) == 3:
        return entropy > _MIN_ENTROPY and changes > _MIXED_CASE
    return entropy > _MIN_ENTROPY and changes > _ONE_CASE and len(word) >= _ONE_CASE_LENGTH


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
