"""Follows the logs of a run for `efflaunch logs --follow`: lines as they are written, until the run has ended."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path

from ..rundir.small_files import plain_lines

PAUSE_S = 0.25
_TURNS = 8
"""Looks at files for each look at what asks a scheduler: which files there are, and whether the run is over."""
_MAX_READ = 1 << 20
_TAIL_BYTES = 64 << 10


class LogFollower:
    """Prints what is added to files, in whole lines, each time under the name of the file where that is another one."""

    def __init__(self, num_lines: int) -> None:
        self._num_lines: int | None = num_lines
        """Lines of a file that is there at the first look; files that come later are printed from their beginning."""
        self._offsets: dict[Path, int] = {}
        self._named: Path | None = None

    def look(self, paths: Sequence[Path], *, last: bool = False) -> None:
        """Print what is new in these files; with `last` also a line that has no end yet."""
        for path in paths:
            if path not in self._offsets:
                self._offsets[path] = 0 if self._num_lines is None else self._print_tail(path, self._num_lines)
            while self._print_more(path, last=last):
                pass
        self._num_lines = None

    def _print_tail(self, path: Path, num_lines: int) -> int:
        """Print the last lines of a file; returns the offset behind them."""
        size = _size(path)
        start = max(0, size - _TAIL_BYTES)
        data = _read(path, start, size - start)
        whole = data[: data.rfind(b"\n") + 1]
        self._print(path, plain_lines(whole)[-num_lines:] if num_lines else [])
        return start + len(whole)

    def _print_more(self, path: Path, *, last: bool) -> bool:
        """Print what a file has from its offset on; True where there is more than was read."""
        if _size(path) < self._offsets[path]:
            # Written anew: Ray's job server hands out all of an output each time.
            self._offsets[path] = 0
        data = _read(path, self._offsets[path], _MAX_READ)
        is_more = len(data) == _MAX_READ
        # A line longer than a read is printed in parts.
        end = len(data) if last or (is_more and b"\n" not in data) else data.rfind(b"\n") + 1
        self._offsets[path] += end
        self._print(path, plain_lines(data[:end]))
        return is_more

    def _print(self, path: Path, lines: Sequence[str]) -> None:
        if not lines:
            return
        if path != self._named:
            print(*([""] if self._named is not None else []), f"== {path}", sep="\n")
            self._named = path
        print(*lines, sep="\n", flush=True)


def follow(
    files: Callable[[], Sequence[Path]], is_over: Callable[[], bool], *, num_lines: int, pause: Callable[[], None] | None = None
) -> None:
    """Print the last `num_lines` of each of `files`, then what is added, until `is_over`; the logs of later attempts too."""
    follower, turn = LogFollower(num_lines), 0
    paths: Sequence[Path] = ()
    while True:
        # Asked first: what was written before the end is still read.
        over = turn % _TURNS == 0 and is_over()
        if turn % _TURNS == 0:
            paths = files()
        follower.look(paths, last=over)
        if over:
            return
        turn += 1
        time.sleep(PAUSE_S) if pause is None else pause()


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def _read(path: Path, start: int, num_bytes: int) -> bytes:
    try:
        with path.open("rb") as file:
            file.seek(start)
            return file.read(num_bytes)
    except FileNotFoundError:
        return b""
