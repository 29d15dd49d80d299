"""Reads what a directory of safetensors holds from headers alone: names, shapes, types, places. Reads no weights; no torch.

Note: a safetensors file is the length of its header (8 bytes, little endian), the header (JSON: name -> dtype, shape, data_offsets),
and the data. A directory has one file, model.safetensors, or shards that model.safetensors.index.json lists by tensor; with both,
transformers reads the one file, and so does this.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

from ..errors import ConfigError
from ..utils.names import is_file_name

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
MAX_HEADER_BYTES = 100_000_000
"""Limit of a header's length, as the safetensors library has it."""
MAX_INDEX_BYTES = 1 << 30
COMPARED_BYTES = 16 << 20
"""Read at one time of each of two tensors that are compared."""
_BITS: Mapping[str, int] = {
    **dict.fromkeys(("F64", "I64", "U64", "C64"), 64),
    **dict.fromkeys(("F32", "I32", "U32"), 32),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 16),
    **dict.fromkeys(("F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ", "I8", "U8", "BOOL"), 8),
    "F6_E2M3": 6, "F6_E3M2": 6, "F4": 4,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """One tensor in a file."""

    file: str
    """File name in the directory."""
    dtype: str
    """Type as safetensors names it: F32, BF16, F8_E4M3, ..."""
    shape: tuple[int, ...]
    start: int
    """First byte in the file, and the one after the last."""
    stop: int


def read_headers(folder: Path) -> dict[str, StoredTensor]:
    """Every tensor that a model is loaded from, by name. ConfigError where a file is missing, damaged or not of the index."""
    if (folder / SINGLE).is_file():
        return read_header(folder / SINGLE)
    if (folder / INDEX).is_file():
        return _sharded(folder)
    raise _no_weights(folder)


def has_weights(folder: Path) -> bool:
    """Whether there is anything to load: false of a hub's snapshot with nothing but its config.json so far."""
    return any(path.suffix in (".safetensors", ".bin", ".pt", ".pth", ".gguf") or path.name == INDEX for path in folder.iterdir())


def read_header(path: Path) -> dict[str, StoredTensor]:
    """The tensors of one safetensors file. ConfigError where header and file do not fit together."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(MAX_HEADER_BYTES, size - 8):
                raise ValueError(f"a file of {size:,} bytes with a header of {length:,}: cut off, or another kind of file")
            header = json.loads(file.read(length), object_pairs_hook=_no_duplicates)
        if not isinstance(header, dict):
            raise ValueError("a header that is no object")
        header.pop("__metadata__", None)
        tensors = {name: _stored(path.name, name, entry, 8 + length) for name, entry in header.items()}
        _check_extent(tensors, 8 + length, size)
    except (OSError, ValueError, RecursionError) as error:
        raise _damaged(path, str(error)) from error
    return tensors


def hold_the_same(folder: Path, one: StoredTensor, other: StoredTensor) -> bool:
    """Whether two stored tensors are equal, bit by bit in the same precision and by value otherwise. Reads both, unless shapes differ."""
    if one.shape != other.shape:
        return False
    if one.dtype != other.dtype:
        return _equal_values(folder, one, other)
    with (folder / one.file).open("rb") as first, (folder / other.file).open("rb") as second:
        first.seek(one.start)
        second.seek(other.start)
        left = one.stop - one.start
        while left > 0:
            size = min(left, COMPARED_BYTES)
            if first.read(size) != second.read(size):
                return False
            left -= size
    return True


def _equal_values(folder: Path, one: StoredTensor, other: StoredTensor) -> bool:
    import torch
    from safetensors import safe_open

    def rows(stored: StoredTensor) -> torch.Tensor:
        names = [name for name, entry in read_header(folder / stored.file).items() if entry.start == stored.start]
        with safe_open(folder / stored.file, framework="pt") as file:
            return file.get_tensor(names[0]).to(torch.float64)

    return torch.equal(rows(one), rows(other))


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    members = dict(pairs)
    if len(members) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)!r} twice")
    return members


def _stored(file: str, name: str, entry: Any, first: int) -> StoredTensor:
    if not isinstance(entry, dict):
        raise ValueError(f"{name!r} described by {entry!r}")
    dtype, shape, offsets = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    if not _are_sizes(shape) or not _are_sizes(offsets) or len(offsets) != 2 or not isinstance(dtype, str):
        raise ValueError(f"{name!r} described by {entry!r}")
    start, stop = offsets
    expected = (math.prod(shape) * _BITS[dtype] + 7) // 8 if dtype in _BITS else stop - start
    if stop - start != expected:
        raise ValueError(f"{name!r}, {dtype} of shape {shape}, in {stop - start:,} bytes instead of {expected:,}")
    return StoredTensor(file, dtype, tuple(shape), first + start, first + stop)


def _are_sizes(value: Any) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(isinstance(item, int) and not isinstance(item, bool) and 0 <= item < 1 << 62 for item in value)


def _check_extent(tensors: Mapping[str, StoredTensor], first: int, size: int) -> None:
    """Check that the tensors fill the file, one after the other."""
    at = first
    for name, stored in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].stop)):
        if stored.start != at:
            raise ValueError(f"{name!r} from byte {stored.start:,} on, where {at:,} was to be expected")
        at = stored.stop
    if at != size:
        raise ValueError(f"{size:,} bytes, of which the header knows {at:,}: {'cut off' if size < at else 'more than it should have'}")


def _sharded(folder: Path) -> dict[str, StoredTensor]:
    names = _read_index(folder / INDEX)
    missing = sorted({file for file in names.values() if not (folder / file).is_file()})
    if missing:
        shown = f"{', '.join(missing[:3])}{f' and {len(missing) - 3} more' if len(missing) > 3 else ''}"
        raise _wrong(folder, f"no {shown}, which {INDEX} lists", "every shard", "the files that are missing, as they were published")
    shards = {file: read_header(folder / file) for file in sorted(set(names.values()))}
    owners: dict[str, str] = {}
    for file, tensors in shards.items():
        for name in tensors:
            if name in owners:
                actual = f"{name} in {owners[name]} and in {file}"
                raise _wrong(folder, actual, "each tensor once", "the shards of one model, without those of another")
            owners[name] = file
    for name, file in names.items():
        if owners.get(name) != file:
            actual = f"no {name} in {file}, where {INDEX} has it" + (f" (it is in {owners[name]})" if name in owners else "")
            raise _wrong(folder, actual, "shards that fit the index", "all files of the same revision")
    return {name: shards[file][name] for name, file in owners.items()}


def _read_index(path: Path) -> dict[str, str]:
    try:
        if path.stat().st_size > MAX_INDEX_BYTES:
            raise ValueError(f"{path.stat().st_size:,} bytes")
        names = json.loads(path.read_text(encoding="utf-8")).get("weight_map")
        if not isinstance(names, dict) or not names:
            raise ValueError("no weight_map")
        for name, file in names.items():
            # A shard lies beside its index: nothing elsewhere on this machine is opened for it.
            if not isinstance(file, str) or not is_file_name(file):
                raise ValueError(f"{name} in {file!r}, which is no file of this directory")
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        raise _damaged(path, str(error)) from error
    return {str(name): str(file) for name, file in names.items()}


def _no_weights(folder: Path) -> ConfigError:
    there = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    pickled = [name for name in there if name.endswith((".bin", ".pt", ".pth", ".ckpt")) and not name.startswith("training_args")]
    loose = [name for name in there if name.endswith(".safetensors")]
    expected = f"{SINGLE}, or {INDEX} with its shards"
    if any(name.startswith("adapter_model") for name in there):
        actual, hint = (
            "an adapter (adapter_model) without the model it is for",
            "merge it first: peft's merge_and_unload() and save_pretrained(OUT)",
        )
    elif loose:
        actual, hint = f"{', '.join(loose[:3])} without {INDEX}", f"the index beside the shards, or one file under the name {SINGLE}"
    elif pickled:
        actual = f"{pickled[0]} alone: pickled weights, which run code when they are read"
        hint = (
            "convert it: AutoModelForCausalLM.from_pretrained(DIRECTORY, use_safetensors=False).save_pretrained(OUT), then model.path=OUT"
        )
    else:
        actual, hint = f"neither {SINGLE} nor {INDEX}", "a directory written by save_pretrained, or model.path=null"
    return _wrong(folder, actual, expected, hint)


def _damaged(path: Path, problem: str) -> ConfigError:
    return ConfigError(
        f"model.path {path.parent}: {path.name}",
        found=problem,
        expected="a file as safetensors writes it",
        hint=f"fetch {path.name} again",
    )


def _wrong(folder: Path, actual: str, expected: str, hint: str) -> ConfigError:
    return ConfigError(f"model.path {folder}", found=actual, expected=expected, hint=hint)
