"""Traces from torch's CUDA memory history: the snapshots of torch.cuda.memory, read from a file.

A snapshot holds, per device, the allocator's events in order (`device_traces`): "alloc" with the bytes asked for,
"free_requested" when the owner lets go, "free_completed" when the block may be used again, which is later where another stream
still reads it; and what happens to segments, which is no matter of tensors. Not yet run on a GPU.
"""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ...errors import DataError
from .trace import Trace, trace_of


def read_snapshot(path: Path, device: int = 0) -> Trace:
    """Reads a file of torch.cuda.memory._dump_snapshot. DataError for any other, and for one that holds more than plain data."""
    try:
        with path.open("rb") as file:
            snapshot = _PlainData(file).load()
        return snapshot_trace(snapshot, device)
    except (pickle.UnpicklingError, EOFError, AttributeError, KeyError, TypeError, IndexError, ValueError) as error:
        raise DataError(
            str(path),
            found=f"a file that is no memory snapshot ({error})",
            expected="one of torch.cuda.memory._dump_snapshot with a history (_record_memory_history before it)",
            hint="torch.cuda.memory._record_memory_history(); one step; torch.cuda.memory._dump_snapshot('step.pickle')",
        ) from error


def snapshot_trace(snapshot: dict[str, Any], device: int = 0) -> Trace:
    """What was allocated in the history; what was there before is no part of it. ValueError where there is no history."""
    history = snapshot["device_traces"][device]
    if not history:
        raise ValueError(f"no history of device {device}")
    return trace_of(_requests(history))


def _requests(history: list[dict[str, Any]]) -> Iterator[tuple[int, int]]:
    numbers: dict[int, int] = {}
    made = 0
    for entry in history:
        address = entry.get("addr", -1)
        if entry["action"] == "alloc":
            made += 1
            numbers[address] = made
            yield made, int(entry["size"])
        elif entry["action"] == "free_completed" and address in numbers:
            yield numbers.pop(address), 0


class _PlainData(pickle.Unpickler):
    """Snapshots are dicts, lists, numbers and text: anything else is refused, for a pickle can run what it names."""

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"it refers to {module}.{name}")
