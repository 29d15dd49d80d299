"""Reading metrics.jsonl while it is being written, and the newest step of a run."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ...utils.text import plain_data
from .metrics_events import is_sound

METRICS_FILE = "metrics.jsonl"
_ESCAPES = re.compile(rb"\\u|[\x7f-\xff]")
"""Pattern of escapes and bytes beyond printable ASCII in a line."""
Event = dict[str, Any]


class MetricsFollower:
    """Each call of `read` gives the events added since the one before; a half-written last line waits for its end."""

    def __init__(self, run_dir: Path, *, from_end: bool = False) -> None:
        self.path = run_dir / METRICS_FILE
        self._offset = self.path.stat().st_size if from_end and self.path.is_file() else 0

    def read(self) -> list[Event]:
        try:
            with self.path.open("rb") as file:
                file.seek(self._offset)
                data = file.read()
        except FileNotFoundError:
            return []
        end = data.rfind(b"\n") + 1
        self._offset += end
        return list(_events(data[:end]))


def _events(data: bytes) -> Iterator[Event]:
    for line in data.splitlines():
        event = parse_line(line)
        if event is not None:
            yield event


def parse_line(line: bytes) -> Event | None:
    """The event of a line, without terminal escapes; None where it is torn or damaged: a rank killed in the middle, or somebody's edit."""
    try:
        event = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not is_sound(event):
        return None
    return plain_data(event) if _ESCAPES.search(line) else event  # type: ignore[no-any-return]


def checkpoint_steps(run_dir: Path) -> list[int]:
    """Steps of the committed checkpoints, oldest first."""
    names = (path.parent.name for path in (run_dir / "checkpoints").glob("step-*/COMMIT"))
    return sorted(int(name.removeprefix("step-")) for name in names if name.removeprefix("step-").isdecimal())
