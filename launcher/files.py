"""Small files that are either old or new, never half of each."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


def write_atomic(path: Path, text: str) -> None:
    """Replace `path` by `text`; a crash leaves the old file. The directory must exist."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def write_json(path: Path, value: Any) -> None:
    """write_atomic of `value` as indented JSON."""
    write_atomic(path, json.dumps(value, indent=1) + "\n")


def tail_lines(path: Path, num_lines: int, max_bytes: int = 64 << 10) -> list[str]:
    """The last lines of a text file, reading at most `max_bytes`; none where there is no file."""
    try:
        with path.open("rb") as file:
            file.seek(0, os.SEEK_END)
            file.seek(max(0, file.tell() - max_bytes))
            return file.read().decode("utf-8", "replace").splitlines()[-num_lines:]
    except FileNotFoundError:
        return []
