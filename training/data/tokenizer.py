"""What a tokenizer's vocabulary is, without loading more than needed. `transformers` only where there is no other way."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass
from typing import Any

from ...errors import DataError

BESIDE = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja", "additional_chat_templates")
"""Files and folders beside a tokenizer.json that say more of the same tokenizer."""


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """Size (largest id + 1) and identity of a tokenizer's vocabulary."""

    size: int
    sha256: str


def read_vocabulary(tokenizer: str) -> Vocabulary:
    """The vocabulary of a tokenizer.json, a directory with one, or a hub name. DataError if it cannot be read."""
    path = os.path.join(tokenizer, "tokenizer.json") if os.path.isdir(tokenizer) else tokenizer
    if os.path.isfile(path):
        return _vocabulary_of(_load_file(path))
    return _vocabulary_of(load_tokenizer(tokenizer).backend_tokenizer)


def _load_file(path: str) -> Any:
    from tokenizers import Tokenizer

    try:
        return Tokenizer.from_file(path)
    except Exception as error:  # the library raises bare Exception for bad files
        raise _unreadable(path, error) from error


def _vocabulary_of(backend: Any) -> Vocabulary:
    vocabulary: dict[str, int] = backend.get_vocab(with_added_tokens=True)
    text = json.dumps(sorted(vocabulary.items()), ensure_ascii=True)
    return Vocabulary(max(vocabulary.values(), default=-1) + 1, hashlib.sha256(text.encode()).hexdigest())


def load_tokenizer(tokenizer: str) -> Any:
    """The `transformers` fast tokenizer of a tokenizer.json, a directory or a hub name. DataError if there is none.

    A tokenizer.json is its directory's where class, special tokens or chat template lie beside it.
    """
    import transformers

    from_file: Any = transformers.PreTrainedTokenizerFast
    folder, name = os.path.split(tokenizer)
    if name == "tokenizer.json" and os.path.isfile(tokenizer) and any(os.path.exists(os.path.join(folder, other)) for other in BESIDE):
        tokenizer = folder or "."
    try:
        if os.path.isfile(tokenizer):
            loaded: Any = from_file(tokenizer_file=tokenizer)
        elif _names_no_class(tokenizer):
            loaded = from_file.from_pretrained(tokenizer)
        else:
            _check_place(tokenizer)
            # False, not unset: transformers would ask a person whether to run the directory's code, and wait for the answer.
            loaded = transformers.AutoTokenizer.from_pretrained(tokenizer, trust_remote_code=False)
    except DataError:
        raise
    except Exception as error:  # anything from OSError to a JSON error of the Rust side, all meaning the same to a person
        raise _unreadable(tokenizer, error) from error
    if not getattr(loaded, "is_fast", False):
        raise _unreadable(tokenizer, "it has no fast (Rust) version")
    return loaded


def _check_place(tokenizer: str) -> None:
    """Raise DataError for what is neither a directory nor a name the hub could have: the hub is not asked for a mistyped path."""
    from ...model.model_files import is_hub_name

    if not os.path.isdir(tokenizer) and (not is_hub_name(tokenizer) or tokenizer.endswith(".json")):
        raise _unreadable(tokenizer, "no such file or directory")


def _names_no_class(tokenizer: str) -> bool:
    """Whether a directory's tokenizer.json is all there is to it: AutoTokenizer would find the same, and import torch for it."""
    config = os.path.join(tokenizer, "tokenizer_config.json")
    if not (os.path.isfile(config) and os.path.isfile(os.path.join(tokenizer, "tokenizer.json"))):
        return False
    with open(config, encoding="utf-8") as stream:
        return json.load(stream).get("tokenizer_class") in ("PreTrainedTokenizerFast", "TokenizersBackend")


def _unreadable(tokenizer: str, reason: object) -> DataError:
    lines = str(reason).strip().splitlines()
    return DataError(
        f"tokenizer {tokenizer}",
        found=f"nothing that can be loaded ({lines[0] if lines else type(reason).__name__})",
        expected="a tokenizer.json, a directory that holds one, or a hub name where there is a network",
        hint="--tokenizer PATH for data prepare, data.tokenizer=PATH for training",
    )
