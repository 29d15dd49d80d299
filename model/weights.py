"""Pretrained weights from safetensors, each rank reading only its own rows."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import BinaryIO

import torch
from safetensors import safe_open
from torch import nn

from ..errors import ConfigError
from ..parallel.sharding.parts import memory_of, slices


@torch.no_grad()
def load_weights(model: nn.Module, path: str, told: Callable[[str], None] | None = None) -> None:
    """Fill every parameter from a directory of safetensors, or a hub name where there is a network.

    ConfigError where files are missing, or a tensor is missing or has another shape: all of them named, nothing half-loaded is used.
    `told` hears of each tensor that is read.
    """
    folder = _folder(path)
    files = _index(folder)
    parameters = dict(model.named_parameters())
    missing = [name for name in parameters if name not in files]
    if missing:
        raise _wrong(
            folder, f"no tensor for {', '.join(missing[:5])}{' and more' if len(missing) > 5 else ''}", "every weight of the model"
        )
    with ExitStack() as stack:
        opened = {file: stack.enter_context(safe_open(folder / file, framework="pt")) for file in sorted(set(files.values()))}
        for name, parameter in parameters.items():
            if told is not None:
                told("reading weights")
            saved = opened[files[name]].get_slice(name)
            if list(saved.get_shape()) != list(parameter.shape):
                raise _wrong(folder, f"{name} of shape {saved.get_shape()}", f"{list(parameter.shape)}")
            part = slices(parameter)
            # safetensors slices must not be empty: a rank beyond the last row holds none.
            if all(piece.start < piece.stop for piece in part):
                memory_of(parameter).copy_(saved[part])


EDGE_BYTES = 4096
"""Of the data of each tensor, read at both its ends for a fingerprint."""


def weights_fingerprint(path: str) -> str:
    """Changes with the weights under `path` and their config.json, not with where they are or when they were written.

    Of each file: name, size, header, and both ends of the data of every tensor. ConfigError as for `load_weights`.
    """
    folder = _folder(path)
    digest = hashlib.sha256()
    config = folder / "config.json"
    digest.update(config.read_bytes() if config.is_file() else b"")
    for name in sorted(set(_index(folder).values())):
        digest.update(f"{name} {(folder / name).stat().st_size}".encode())
        with (folder / name).open("rb") as file:
            for part in _telling_parts(file):
                digest.update(part)
    return digest.hexdigest()


def _telling_parts(file: BinaryIO) -> Iterator[bytes]:
    """The header of an open safetensors file (its length in 8 bytes, then JSON), and both ends of each tensor."""
    length = file.read(8)
    header = file.read(int.from_bytes(length, "little"))
    yield header
    first = 8 + len(header)
    for name, entry in json.loads(header).items():
        if name == "__metadata__":
            continue
        start, stop = entry["data_offsets"]
        for place in (start, max(start, stop - EDGE_BYTES)):
            file.seek(first + place)
            yield file.read(min(EDGE_BYTES, stop - place))


def _folder(path: str) -> Path:
    if Path(path).is_dir():
        return Path(path)
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(path, allow_patterns=["*.safetensors", "*.json"]))
    except (OSError, ValueError) as error:
        raise ConfigError(
            "model.path",
            found=f"{path} ({error})",
            expected="a directory of safetensors, or a hub name and a network",
            hint="model.path=DIRECTORY",
        ) from error


def _index(folder: Path) -> dict[str, str]:
    """Tensor name -> file."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        names: dict[str, str] = json.loads(index.read_text())["weight_map"]
        return names
    single = folder / "model.safetensors"
    if not single.is_file():
        raise _wrong(folder, "neither model.safetensors nor model.safetensors.index.json", "one of them")
    with safe_open(single, framework="pt") as opened:
        return dict.fromkeys(opened.keys(), single.name)


def _wrong(folder: Path, found: str, expected: str) -> ConfigError:
    return ConfigError(
        f"model.path={folder}", found=found, expected=expected, hint="a directory written by save_pretrained, or model.path=null"
    )
