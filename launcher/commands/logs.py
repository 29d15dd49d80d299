"""`efflaunch logs RUN_DIR` and `efflaunch cancel RUN_DIR`, for every backend."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from ...errors import EXIT_DONE, ConfigError
from ..backend_registry import launcher_of
from ..rundir.run_dir import attempt_dir, keep_private, read_run
from ..rundir.small_files import tail_lines
from ..rundir.state import Failure, RunState, read_state


def main(run_dir: Path, *, num_lines: int, every_rank: bool) -> int:
    """Print them; exit code 0 whatever became of the run."""
    stored, known = read_run(run_dir), read_state(run_dir)
    failure = known.failure if known else None
    for path in launcher_of(stored.config.launcher.backend).logs(run_dir)[-1:]:
        _show(path, tail_lines(path, num_lines))
    for path in _rank_logs(run_dir):
        is_wanted = every_rank or _rank_of(path) in (0, failure.rank if failure else 0)
        # In full below; of a rank that hung that is its stacks, not its log.
        if is_wanted and not (failure and path == run_dir / failure.log):
            _show(path, tail_lines(path, num_lines))
    if failure is not None:
        _show_failure(run_dir, failure)
    return EXIT_DONE


def cancel(run_dir: Path, *, now: bool) -> int:
    """Ask the run's backend, and say what it did."""
    stored = read_run(run_dir)
    keep_private(stored.config.run.private)
    print(launcher_of(stored.config.launcher.backend).cancel(run_dir, _known(run_dir), now=now))
    return EXIT_DONE


def _known(run_dir: Path) -> RunState:
    known = read_state(run_dir)
    if known is None:
        raise ConfigError(str(run_dir), found="a run that never started", expected="one that runs", hint=f"efflaunch resume {run_dir}")
    return known


def _rank_logs(run_dir: Path) -> list[Path]:
    """Of the newest attempt that has any, by rank."""
    named = (path.name.partition("-")[2] for path in (run_dir / "logs").glob("attempt-*"))
    numbers = sorted(int(number) for number in named if number.isdecimal())
    for number in reversed(numbers):
        found = sorted(attempt_dir(run_dir, number).glob("rank-*.log"), key=_rank_of)
        if found:
            return found
    return []


def _rank_of(path: Path) -> int:
    found = re.fullmatch(r"rank-(\d+)\.log", path.name)
    return int(found[1]) if found else -1


def _show(path: Path, lines: list[str]) -> None:
    print(f"== {path}", *lines, "", sep="\n")


def _show_failure(run_dir: Path, failure: Failure) -> None:
    log = run_dir / failure.log
    if log.is_file():
        print(f"== {log}, in full", *_lines(log), "", sep="\n")
    elif failure.traceback:
        print(failure.traceback)
    print(f"first failure: {failure.message}")


def _lines(log: Path) -> Iterator[str]:
    with log.open(encoding="utf-8", errors="replace") as file:
        for line in file:
            yield line.rstrip("\n")
