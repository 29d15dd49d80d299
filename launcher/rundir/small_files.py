"""Small files of a run directory."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from ...utils.atomic_files import write_atomic


def write_json(path: Path, value: Any) -> None:
    """write_atomic of `value` as indented JSON."""
    write_atomic(path, json.dumps(value, indent=1) + "\n")


def read_json(path: Path) -> Any:
    """What write_json wrote; None where there is no file."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None


def tail_lines(path: Path, num_lines: int, max_bytes: int = 64 << 10) -> list[str]:
    """The last lines of a text file, reading at most `max_bytes`; none where there is no file."""
    try:
        with path.open("rb") as file:
            file.seek(0, os.SEEK_END)
            file.seek(max(0, file.tell() - max_bytes))
            return file.read().decode("utf-8", "replace").splitlines()[-num_lines:]
    except FileNotFoundError:
        return []
