"""Corpora made on the spot, so that a run needs no download: `python_stdlib`, the source files of the running Python.

The tokenizer (byte-level BPE) is trained on the same files. Both are cached under a name made of the Python version,
the vocabulary size and the files' content; whoever comes first builds, the others wait for the lock.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import sysconfig
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ...errors import ConfigError
from ...utils.atomic_files import locked, sync, write_atomic
from .indexed import dtype_for
from .tokenizer import read_vocabulary
from .writer import IndexedWriter

END_OF_TEXT = "<|endoftext|>"
_FORMAT = 1
"""Part of the cache key: raise it when what is written changes."""
_LEFT_OUT = {"site-packages", "dist-packages", "__pycache__"}
_BATCH = 64


@dataclass(frozen=True, slots=True)
class BuiltinCorpus:
    """A corpus that is ready: prefix for `data.prefixes`, directory for `data.tokenizer`."""

    prefix: str
    tokenizer: str


def builtin_corpus(name: str, *, vocab_size: int | None, cache_dir: str | None = None) -> BuiltinCorpus:
    """The cached corpus, built if need be (some seconds; safe to call from several processes at once)."""
    if name != "python_stdlib":
        raise ConfigError("data.builtin", found=repr(name), expected="python_stdlib", hint="data.builtin=python_stdlib")
    if vocab_size is None or vocab_size < 257:
        expected = "at least 257: 256 bytes and the end-of-text token"
        raise ConfigError("data.vocab_size", found=str(vocab_size), expected=expected, hint="data.vocab_size=8192")
    files = stdlib_files()
    root = Path(cache_dir) if cache_dir else Path.home() / ".cache" / "efflaunch"
    root.mkdir(parents=True, exist_ok=True)
    folder = root / f"{name}-{platform.python_version()}-v{vocab_size}-{_content_of(files, root / f'{name}-read')}"
    with locked(root / f"{folder.name}.lock"):
        if not folder.exists():
            _build(folder, read_texts(files), vocab_size)
    return BuiltinCorpus(str(folder / "corpus"), str(folder))


def stdlib_files() -> list[Path]:
    """Every .py file of the running Python's standard library, its tests included where installed; sorted."""
    root = Path(sysconfig.get_paths()["stdlib"])
    paths = []
    for folder, names, files in os.walk(root):
        names[:] = sorted(name for name in names if name not in _LEFT_OUT)
        paths += [Path(folder, name) for name in files if name.endswith(".py")]
    return sorted(paths, key=lambda path: path.relative_to(root).as_posix())


def read_texts(paths: Iterable[Path]) -> list[str]:
    """The texts of the files that are UTF-8 and not empty, in order (a few tests are in other encodings on purpose)."""
    texts = []
    for path in paths:
        try:
            text = path.read_bytes().decode("utf-8")
        except UnicodeDecodeError:
            continue
        if text:
            texts.append(text)
    return texts


def train_tokenizer(texts: Iterable[str], vocab_size: int, folder: Path) -> None:
    """Train a byte-level BPE on `texts` and write it as a Hugging Face tokenizer directory. Deterministic."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = f'{{"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "{END_OF_TEXT}"}}\n'
    (folder / "tokenizer_config.json").write_text(config, encoding="utf-8")


def _content_of(files: list[Path], known: Path) -> str:
    """The hash of the files' texts, read where a file is new or was written since; otherwise as noted in `known`.

    Every rank of every run asks: reading forty megabytes each time takes most of a second.
    """
    seen = hashlib.sha256(f"{_FORMAT}".encode())
    for file in files:
        state = file.stat()
        seen.update(f"{file} {state.st_size} {state.st_mtime_ns} {state.st_ino}\n".encode())
    note = known.with_name(f"{known.name}-{seen.hexdigest()[:16]}")
    with locked(known.with_name(f"{known.name}.lock")):
        if not note.exists():
            write_atomic(note, _content_hash(read_texts(files)))
        return note.read_text(encoding="ascii")


def _content_hash(texts: list[str]) -> str:
    digest = hashlib.sha256(f"{_FORMAT}".encode())
    for text in texts:
        data = text.encode()
        digest.update(len(data).to_bytes(8, "little") + data)
    return digest.hexdigest()[:16]


def _build(folder: Path, texts: list[str], vocab_size: int) -> None:
    part = folder.with_name(folder.name + ".part")
    # A builder that was killed leaves its folder behind; the lock says nobody is in it now.
    shutil.rmtree(part, ignore_errors=True)
    train_tokenizer(texts, vocab_size, part)
    _write_corpus(part, texts)
    sync(part)
    os.rename(part, folder)
    sync(folder.parent)


def _write_corpus(folder: Path, texts: list[str]) -> None:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    end = tokenizer.token_to_id(END_OF_TEXT)
    vocabulary = read_vocabulary(str(folder))
    writer = IndexedWriter(str(folder / "corpus"), dtype_for(vocabulary.size))
    for first in range(0, len(texts), _BATCH):
        for encoding in tokenizer.encode_batch_fast(texts[first : first + _BATCH]):
            writer.add(np.array([*encoding.ids, end], dtype=np.int64))
    description = {"path": str(folder.with_suffix("")), "vocab_size": vocabulary.size, "vocab_sha256": vocabulary.sha256}
    writer.finish({"documents": writer.documents, "tokens": writer.tokens, "loss_mask": False, "tokenizer": description})
