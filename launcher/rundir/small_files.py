"""Small files of a run directory."""

from __future__ import annotations

import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

from ...utils.atomic_files import write_atomic
from ...utils.text import plain


def write_json(path: Path, value: Any) -> None:
    """write_atomic of `value` as indented JSON."""
    write_atomic(path, json.dumps(value, indent=1) + "\n")


def write_if_room(path: Path, value: Any) -> None:
    """write_json of what only helps people: a full disk is no reason to end ranks."""
    with suppress(OSError):
        write_json(path, value)


def read_json(path: Path) -> Any:
    """Read what write_json wrote; None where there is no file."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None


def plain_lines(data: bytes) -> list[str]:
    """Lines of a log, without what a terminal would act on; a progress bar's steps are lines too."""
    return [plain(line) for line in data.decode("utf-8", "replace").splitlines()]


def tail_lines(path: Path, num_lines: int, max_bytes: int = 64 << 10) -> list[str]:
    """The last lines of a text file, reading at most `max_bytes`; none where there is no file."""
    try:
        with path.open("rb") as file:
            file.seek(0, os.SEEK_END)
            file.seek(max(0, file.tell() - max_bytes))
            return plain_lines(file.read())[-num_lines:]
    except FileNotFoundError:
        return []
