"""Reads where a run stands from its metrics, without parsing all of them or reading again what was read before.

Note: the index. Of a step only `step`, `loss` and `step_s` matter once the next one is there, so these are cut out of its line
by pattern; the last step of every start is parsed whole, as is everything else. What was made of a long file is kept in
INDEX_FILE with the offset it reaches to, and the next reader begins there. It is a cache: where it does not fit the
file it is rebuilt, and a reader who may not write goes without.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from ...utils.atomic_files import write_atomic
from ..stop_forecast import Forecast, GraceWatch
from .metrics_reader import METRICS_FILE, Event, checkpoint_steps, parse_line
from .progress import RunProgress

INDEX_FILE = ".metrics-index.json"
_FORMAT = 1
_LEAST_BYTES = 4 << 20
"""Bytes that have to have been read for the index to be worth rewriting."""
_CHECKED = 4096
"""Bytes at the beginning and before the offset that must be the same for an index to fit."""
_BRIEF = re.compile(rb'"event": "step"')
_STEP, _LOSS, _SECONDS = (re.compile(rb'"%s": ([-+0-9.eE]+|null)' % name) for name in (b"step", b"loss", b"step_s"))
_HEAD_BYTES = 400


@dataclass(slots=True)
class Summary:
    """Events in order; of steps the last of each start in full, of the others `step`, `loss` and `step_s`."""

    events: list[Event] = field(default_factory=list)
    bytes_read: int = 0
    """Bytes of metrics.jsonl that this look read."""

    def progress(self) -> RunProgress:
        """Return where the run stands."""
        return RunProgress().apply(self.events)

    def forecast(self, grace_s: float) -> Forecast | None:
        """Return how long a stop takes, by what was measured; None before the first checkpoint."""
        return GraceWatch(grace_s).add(self.events).forecast

    def newest_step(self) -> int:
        """The furthest step of any start; 0 before the first."""
        return max((int(event["step"]) for event in self.events if event["event"] == "step"), default=0)


def read_summary(run_dir: Path) -> Summary:
    """Summarize all the metrics there are by now; the summary is empty where there are none."""
    try:
        with (run_dir / METRICS_FILE).open("rb") as file:
            begin, events = _read_index(run_dir, file)
            file.seek(begin)
            collected = _collect(file, begin, events)
            if collected.kept_bytes - begin >= _LEAST_BYTES:
                _write_index(run_dir, file, collected)
    except FileNotFoundError:
        return Summary()
    return Summary(collected.events, collected.end - begin)


def read_progress(run_dir: Path) -> RunProgress:
    """Return where the run stands by its metrics."""
    return read_summary(run_dir).progress()


def newest_step(run_dir: Path) -> int:
    """The furthest step the run ever finished, by its metrics and its committed checkpoints; 0 before the first."""
    return max([read_summary(run_dir).newest_step(), *checkpoint_steps(run_dir)])


def step_events(run_dir: Path, step: int | None) -> list[Event]:
    """Every event of the run but those of other steps than `step` (None: the furthest), in full."""
    wanted = read_summary(run_dir).newest_step() if step is None else step
    if not (run_dir / METRICS_FILE).is_file():
        return []
    with (run_dir / METRICS_FILE).open("rb") as file:
        lines = (line for line in file if line.endswith(b"\n"))
        kept = [line for line in lines if not _is_step(line) or _number(_STEP, line) in (None, wanted)]
    events = [event for line in kept if (event := parse_line(line)) is not None]
    return [event for event in events if event["event"] != "step" or event["step"] == wanted]


@dataclass(slots=True)
class _Collected:
    events: list[Event]
    num_kept: int = 0
    """Events that no later line changes."""
    kept_bytes: int = 0
    end: int = 0


def _collect(file: BinaryIO, offset: int, events: list[Event]) -> _Collected:
    """Takes in whole lines from here to the end of the file."""
    last: tuple[int, int, bytes] | None = None
    """The newest step of this start: its place among the events, its offset and its line."""
    for line in file:
        if not line.endswith(b"\n"):
            # Still being written, or cut off.
            break
        if _is_step(line):
            event, place = _brief(line), (len(events), offset, line)
            last = place if event is not None else last
        else:
            event = parse_line(line)
            if event is not None and event["event"] == "start":
                _complete(events, last)
                last = None
        if event is not None:
            events.append(event)
        offset += len(line)
    _complete(events, last)
    kept = (len(events), offset) if last is None else last[:2]
    return _Collected(events, *kept, offset)


def _complete(events: list[Event], last: tuple[int, int, bytes] | None) -> None:
    event = parse_line(last[2]) if last is not None else None
    if last is not None and event is not None:
        events[last[0]] = event


def _is_step(line: bytes) -> bool:
    return _BRIEF.search(line, 0, _HEAD_BYTES) is not None


def _brief(line: bytes) -> Event | None:
    step, loss, seconds = (_number(pattern, line) for pattern in (_STEP, _LOSS, _SECONDS))
    if step is None or seconds is None:
        return parse_line(line)
    return {"event": "step", "step": int(step), "loss": loss, "step_s": seconds}


def _number(pattern: re.Pattern[bytes], line: bytes) -> float | None:
    match = pattern.search(line)
    try:
        return None if match is None or match[1] == b"null" else float(match[1])
    except ValueError:
        return None


def _read_index(run_dir: Path, file: BinaryIO) -> tuple[int, list[Event]]:
    """Return (offset to read on from, the events before it); (0, []) where there is no index or it is of another file."""
    with suppress(OSError, ValueError, KeyError, TypeError):
        index = json.loads((run_dir / INDEX_FILE).read_bytes())
        offset = int(index["offset"])
        if index["format"] == _FORMAT and index["check"] == _check(file, offset):
            return offset, list(_unpacked(index["events"]))
    return 0, []


def _write_index(run_dir: Path, file: BinaryIO, collected: _Collected) -> None:
    check = _check(file, collected.kept_bytes)
    value = {
        "format": _FORMAT,
        "offset": collected.kept_bytes,
        "check": check,
        "events": list(_packed(collected.events[: collected.num_kept])),
    }
    # Somebody else's run, or a full disk.
    with suppress(OSError):
        write_atomic(run_dir / INDEX_FILE, json.dumps(value, separators=(",", ":")))


def _check(file: BinaryIO, offset: int) -> str:
    """Return a digest that distinguishes this file, up to the offset, from another one."""
    file.seek(0)
    head = file.read(min(_CHECKED, offset))
    file.seek(max(0, offset - _CHECKED))
    return hashlib.sha256(head + file.read(min(_CHECKED, offset))).hexdigest()


def _packed(events: Iterable[Event]) -> Iterator[Any]:
    for event in events:
        yield event if set(event) != {"event", "step", "loss", "step_s"} else [event["step"], event["loss"], event["step_s"]]


def _unpacked(items: Iterable[Any]) -> Iterator[Event]:
    for item in items:
        yield item if isinstance(item, dict) else {"event": "step", "step": item[0], "loss": item[1], "step_s": item[2]}
