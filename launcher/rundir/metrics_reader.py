"""Reading metrics.jsonl while it is being written, and the newest step of a run."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .metrics_events import is_sound

METRICS_FILE = "metrics.jsonl"
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
        try:
            event = json.loads(line)
        except (ValueError, RecursionError):
            # A rank killed in the middle of a line; the next one starts on it.
            continue
        if is_sound(event):
            yield event


def newest_step(run_dir: Path) -> int:
    """The furthest step the run ever finished, by its metrics and its committed checkpoints; 0 before the first."""
    steps = [int(event["step"]) for event in MetricsFollower(run_dir).read() if event["event"] == "step"]
    return max([0, *steps, *checkpoint_steps(run_dir)])


def checkpoint_steps(run_dir: Path) -> list[int]:
    """Steps of the committed checkpoints, oldest first."""
    names = (path.parent.name for path in (run_dir / "checkpoints").glob("step-*/COMMIT"))
    return sorted(int(name.removeprefix("step-")) for name in names if name.removeprefix("step-").isdigit())
