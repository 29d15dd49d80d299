"""`efflaunch logs RUN_DIR` and `efflaunch cancel RUN_DIR`, for every backend."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator
from pathlib import Path

from ...errors import EXIT_DONE, ConfigError
from ...utils.names import inside
from ...utils.ranges import Range
from ...utils.text import typed
from ..backend_registry import launcher_of
from ..rundir.run_dir import attempt_dir, read_run
from ..rundir.small_files import plain_lines, tail_lines
from ..rundir.state import ACTIVE, STATE_FILE, Failure, read_state
from .arguments import CommandParser, add_run_dir, number_in
from .follow_logs import follow

DESCRIPTION = "What the ranks of a run's last attempt printed; the rank that failed first comes last, in full."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `efflaunch logs`."""
    add_run_dir(parser)
    parser.add_argument(
        "--lines", type=number_in(int, Range(0, 1_000_000)), default=20, metavar="N", help="of every log but that rank's; 20"
    )
    parser.add_argument("-f", "--follow", action="store_true", help="print what is added as well, until the run has ended")
    parser.add_argument("--all", action="store_true", help="every rank, not only rank 0 and the one that failed")


def main(words: list[str]) -> int:
    """Run `efflaunch logs` and return its exit code."""
    parser = CommandParser("logs", DESCRIPTION)
    add_arguments(parser)
    options = parser.parse_args(words)
    show = follow_logs if options.follow else print_logs
    return show(options.run_dir, num_lines=options.lines, every_rank=options.all)


def follow_logs(run_dir: Path, *, num_lines: int, every_rank: bool) -> int:
    """Print the logs and what is added to them until the run ends, then the rank that failed; exit code 0 whatever became of the run."""
    launcher = launcher_of(read_run(run_dir).config.launcher.backend)

    def files() -> list[Path]:
        mine = [path for path in _rank_logs(run_dir) if _is_inside(run_dir, path) and (every_rank or _rank_of(path) == 0)]
        return [*launcher.logs(run_dir)[-1:], *mine]

    def is_over() -> bool:
        run_state = read_state(run_dir)
        return run_state is None or launcher.status(run_dir, run_state).state not in ACTIVE

    try:
        follow(files, is_over, num_lines=num_lines)
    except KeyboardInterrupt:
        # How a person ends it; the run goes on.
        return EXIT_DONE
    run_state = read_state(run_dir)
    if run_state is not None and run_state.failure is not None:
        print()
        _show_failure(run_dir, run_state.failure)
    return EXIT_DONE


def print_logs(run_dir: Path, *, num_lines: int, every_rank: bool) -> int:
    """Print them; exit code 0 whatever became of the run."""
    stored, run_state = read_run(run_dir), read_state(run_dir)
    failure = run_state.failure if run_state else None
    for path in launcher_of(stored.config.launcher.backend).logs(run_dir)[-1:]:
        _show(path, tail_lines(path, num_lines))
    for path in _rank_logs(run_dir):
        is_wanted = _is_inside(run_dir, path) and (every_rank or _rank_of(path) in (0, failure.rank if failure else 0))
        # In full below; of a rank that hung that is its stacks, not its log.
        if is_wanted and not (failure and path == run_dir / failure.log):
            _show(path, tail_lines(path, num_lines))
    if failure is not None:
        _show_failure(run_dir, failure)
    return EXIT_DONE


def _rank_logs(run_dir: Path) -> list[Path]:
    """Return the rank logs of the newest attempt that has any, by rank."""
    named = (path.name.partition("-")[2] for path in (run_dir / "logs").glob("attempt-*"))
    numbers = sorted(int(number) for number in named if number.isdecimal())
    for number in reversed(numbers):
        paths = sorted(attempt_dir(run_dir, number).glob("rank-*.log"), key=_rank_of)
        if paths:
            return paths
    return []


def _rank_of(path: Path) -> int:
    match = re.fullmatch(r"rank-(\d+)\.log", path.name)
    return int(match[1]) if match else -1


def _show(path: Path, lines: list[str]) -> None:
    print(f"== {path}", *lines, "", sep="\n")


def _show_failure(run_dir: Path, failure: Failure) -> None:
    try:
        log = inside(run_dir, failure.log)
    except ValueError as error:
        where = str(run_dir / STATE_FILE)
        raise ConfigError(where, found=f"a log elsewhere: {error}", expected="one of the run's", hint=typed("status", run_dir)) from error
    if log.is_file():
        print(f"== {log}, in full", *_lines(log), "", sep="\n")
    elif failure.traceback:
        print(failure.traceback)
    print(f"first failure: {failure.message}")


def _lines(log: Path) -> Iterator[str]:
    with log.open("rb") as file:
        for line in file:
            yield from plain_lines(line) or [""]


def _is_inside(run_dir: Path, path: Path) -> bool:
    """Return whether a file is the run's own, and no link to somebody else's."""
    return path.resolve().is_relative_to(run_dir.resolve())
