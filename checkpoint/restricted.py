"""Loads files that other programs wrote with torch.save: tensors and plain containers, nothing else. No class of a file is ever run.

torch's restricted unpickler does the reading. Objects of classes that are known to be in such files, and are not needed, become empty
ones; any other class ends the reading with its name. What these files hold is checked against their own CRC-32 first.
"""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from ..errors import CheckpointError

READ_BYTES = 8 << 20
LARGEST_PICKLE = 256 << 20
"""Bytes of what is no tensor in a file: torch reads it whole into memory. Lists of a large model's parameters take some MiB."""


class Ignored:
    """Stands for an object that nobody asks: takes whatever it is made of, and keeps none of it."""

    def __init__(self, *_: object) -> None: ...

    def __setstate__(self, state: object) -> None: ...


class Fields:
    """Stands for an object of plain fields, and keeps them."""

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        self.__dict__.update(state)


def load(path: Path, stand_ins: Mapping[str, type], on_bytes: Callable[[int], None] | None = None) -> dict[str, Any]:
    """The dictionary in a file; its tensors stay in the file until they are read. CheckpointError says what is wrong with it.

    `stand_ins`: classes in place of those of a full name. `on_bytes`: is called with bytes that were checked.
    """
    _check(path, on_bytes)
    try:
        with torch.serialization.safe_globals([(kind, name) for name, kind in stand_ins.items()]):
            content = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except Exception as error:  # the unpickler raises what it meets
        # The error of the unpickler is long, and says how to read everything all the same.
        unsafe = sorted(set(_globals(path)) - set(stand_ins))
        found = f"objects of {', '.join(unsafe)}" if unsafe else f"{type(error).__name__}: {_first_line(error)}"
        raise _unreadable(path, found) from error
    if not isinstance(content, dict):
        raise _unreadable(path, f"a {type(content).__name__}")
    return content


def _globals(path: Path) -> list[str]:
    """Classes in a file that the restricted unpickler would not take; none where even that cannot be read."""
    try:
        return torch.serialization.get_unsafe_globals_in_checkpoint(str(path))
    except Exception:  # a damaged pickle, which the caller names
        return []


def _check(path: Path, on_bytes: Callable[[int], None] | None) -> None:
    """Read every record once; CheckpointError where one is not what was written, or the file is none of torch.save's."""
    try:
        with zipfile.ZipFile(path) as archive:
            for record in archive.infolist():
                if record.compress_type != zipfile.ZIP_STORED:
                    # Its tensors would be mapped as they lie in the file, and a small one may hold any number of bytes.
                    raise _unreadable(path, f"the compressed record {record.filename}")
                if record.filename.rpartition("/")[2] == "data.pkl" and record.file_size > LARGEST_PICKLE:
                    raise _unreadable(path, f"{record.file_size} bytes in {record.filename}, with at most {LARGEST_PICKLE} expected")
                with archive.open(record) as file:
                    while block := file.read(READ_BYTES):
                        if on_bytes is not None:
                            on_bytes(len(block))
    except FileNotFoundError as error:
        raise CheckpointError(str(path), found="no such file", expected="a file of the checkpoint", hint="a copy that is whole") from error
    except CheckpointError:
        raise
    except Exception as error:  # zipfile raises what a damaged file makes it meet
        raise _unreadable(path, _first_line(error)) from error


def _first_line(error: Exception) -> str:
    """What it says, shortened; its class where it says nothing."""
    return next(iter(str(error).splitlines()), type(error).__name__)[:200]


def _unreadable(path: Path, found: str) -> CheckpointError:
    expected = "tensors and plain containers, as torch.save writes them and as they were written"
    return CheckpointError(str(path), found=found, expected=expected, hint="another checkpoint, or a copy that is whole")
