"""Runs one rank: run.yaml -> the training function -> an exit code, with its error on record.

The training function is named as `module:function` and called with (config, run_dir, stop, pulse); it returns 0 when
done and 75 when stopped and saved, and beats the pulse on its way. Ranks never draw on the terminal: all they print goes to their own log.
"""

from __future__ import annotations

import gc
import importlib
import json
import logging
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from ...errors import EXIT_RETRY, EXIT_USER, UserError
from ...utils.atomic_files import write_atomic
from ...utils.heartbeat import Heartbeat, attach
from ...utils.helper_thread import await_ending, ends_with_helpers
from ..config.run_config import Config
from ..config.secrets import redact
from ..env import secrets
from ..output import lenient_output
from ..rundir.run_dir import attempt_dir, read_attempt
from .procfs import permit_tracing
from .signals import StopFlag, die_with_parent, on_stop_signals, release_stop_signals

TRAIN = f"{__package__.partition('.')[0]}.training.trainer:train"
"""The training function of every real run; tests name another."""

LAST_WORDS_S = 10.0
"""Longest wait, after the error is on record, for threads that write what the run had to report."""

TrainFunction = Callable[[Config, Path, StopFlag, Heartbeat], int]


def main(run_dir: str, entry: str, attempt: int, agent_pid: int, board: str) -> int:
    """The rank's life; returns 0 or 75, or ends the process with 93 or 1 and `rank-R.error.json` written. RANK and LOCAL_RANK must be set.

    `board`: where the agent listens for this node's pulses (pulse.Board.place).
    """
    die_with_parent(agent_pid)
    permit_tracing(agent_pid)
    pulse = attach(board, int(os.environ["LOCAL_RANK"]))
    stop = StopFlag()
    on_stop_signals(stop)
    for number in (signal.SIGQUIT, signal.SIGALRM):
        # Forked from an agent that uses these for itself.
        signal.signal(number, signal.SIG_DFL)
    release_stop_signals()
    os.environ["EFFLAUNCH_ATTEMPT"] = str(attempt)
    logs, rank = attempt_dir(Path(run_dir), attempt), int(os.environ["RANK"])
    _print_to(logs / f"rank-{rank}.log")
    _keep_log()
    try:
        with ends_with_helpers(lambda died: _record(logs, rank, died, EXIT_USER if isinstance(died.__cause__, UserError) else EXIT_RETRY)):
            return load_entry(entry)(read_attempt(Path(run_dir), attempt), Path(run_dir), stop, pulse)
    except UserError as error:
        _end(_record(logs, rank, error, EXIT_USER))
    except Exception as error:
        _end(_record(logs, rank, error, EXIT_RETRY))


def load_entry(entry: str) -> TrainFunction:
    """The function behind `module:function`."""
    module, _, name = entry.partition(":")
    function: TrainFunction = getattr(importlib.import_module(module), name)
    return function


def preload(entry: str) -> None:
    """Import what every rank needs before ranks are forked, so that none of them imports it again.

    What is imported stays: the collector never looks at it again, neither now nor in a rank, which would copy every page it looks at.
    """
    gc.disable()
    try:
        module = importlib.import_module(entry.partition(":")[0])
        for name in getattr(module, "PRELOAD", ()):
            importlib.import_module(name)
        gc.freeze()
    finally:
        gc.enable()


def _print_to(log: Path) -> None:
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    sys.stdout.flush()
    sys.stderr.flush()
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.close(file)
    lenient_output()


def _keep_log() -> None:
    """Send this package's messages to the rank's log, with times, and warnings and worse of other packages."""
    logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    logging.getLogger(__package__.partition(".")[0]).setLevel(logging.INFO)


def _end(code: int) -> NoReturn:
    """End this process without Python's own end, which joins threads and takes communicators down: both may wait for other ranks."""
    await_ending(LAST_WORDS_S)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _record(logs: Path, rank: int, error: Exception, exit_code: int) -> int:
    # An address with a token in it is in the error of whoever could not reach it.
    hidden = secrets()
    record: dict[str, Any] = {
        "time": time.time(),
        "rank": rank,
        "exit_code": exit_code,
        "type": type(error).__name__,
        "message": redact(str(error), hidden),
        "traceback": redact("".join(traceback.format_exception(error)), hidden),
    }
    print(record["message"] if exit_code == EXIT_USER else record["traceback"], file=sys.stderr, flush=True)
    try:
        write_atomic(error_file(logs, rank), json.dumps(record))
    except OSError as failure:
        # The exit code still says what kind of an end it was.
        print(f"{error_file(logs, rank)}: {failure}", file=sys.stderr, flush=True)
    return exit_code


def error_file(logs: Path, rank: int) -> Path:
    """Return the file in which a rank of the attempt writes why it failed."""
    return logs / f"rank-{rank}.error.json"


def read_error(logs: Path, rank: int) -> dict[str, Any] | None:
    """Read what the rank wrote about its failure; None where it could not."""
    path = error_file(logs, rank)
    record: dict[str, Any] | None = json.loads(path.read_text()) if path.is_file() else None
    return record
