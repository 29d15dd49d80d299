"""Switches NCCL's flight recorder on and collects what it has of a hang: the newest collectives of each rank, for torchfrtrace to read.

Note: names and files, by the sources of torch (FlightRecorder.hpp, DumpPipe in ProcessGroupNCCL.hpp; 2.11 and 2.13). torch keeps
TORCH_NCCL_TRACE_BUFFER_SIZE entries, and writes them to TORCH_FR_DUMP_TEMP_FILE + rank when a collective times out, or when something is
written to the named pipe TORCH_NCCL_DEBUG_INFO_PIPE_FILE + rank + `.pipe`, which it makes itself and looks at once a second, in a thread
that needs no interpreter. A hang is found long before a collective times out, so the agent asks through the pipe.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from ...cluster.config import Device
from ..config.run_config import Config
from ..env import RECORDER_PIPE, recorder_variables

PREFIX = "nccl-"
"""Of the dumps in an attempt's directory; the rank follows."""
_ANSWER_S = 10.0
"""Seconds a rank may take to write its dump."""


@dataclass(frozen=True, slots=True)
class FlightRecorder:
    """The flight recorders of one node's ranks in one attempt, whose directory is `logs`."""

    logs: Path
    ranks: range
    answer_s: float = _ANSWER_S

    def variables(self) -> dict[str, str]:
        """Return what to set for the ranks. Without the pipe where the file system has none: torch would end a rank for it."""
        values = recorder_variables(str(self.logs / PREFIX))
        if RECORDER_PIPE in values and not _has_pipes(self.logs):
            del values[RECORDER_PIPE]
        return values

    def dump(self, ranks: Iterable[int]) -> frozenset[int]:
        """Have these ranks write their dumps; returns those that have. Takes up to `answer_s` where one that listens does not answer."""
        asked = {rank for rank in ranks if _ask(self._pipe(rank))}
        deadline, seen = time.monotonic() + self.answer_s, dict.fromkeys(asked, 0)
        while time.monotonic() < deadline:
            now = {rank: self._size(rank) for rank in asked}
            if now == seen and all(now.values()):
                break
            seen = now
            time.sleep(0.2)
        return frozenset(rank for rank in ranks if self._size(rank))

    def dump_file(self, rank: int) -> Path:
        """Return where torch writes the rank's dump."""
        return self.logs / f"{PREFIX}{rank}"

    def close(self) -> None:
        """Remove the pipes, which would hold up whoever reads all files of the directory."""
        for rank in self.ranks:
            with suppress(OSError):
                self._pipe(rank).unlink(missing_ok=True)

    def _pipe(self, rank: int) -> Path:
        return self.logs / f"{PREFIX}{rank}.pipe"

    def _size(self, rank: int) -> int:
        try:
            return self.dump_file(rank).stat().st_size
        except OSError:
            return 0


def recorder_of(config: Config, logs: Path, ranks: range) -> FlightRecorder | None:
    """The recorder of an attempt; None where no rank uses NCCL."""
    return FlightRecorder(logs.absolute(), ranks) if config.cluster.device is Device.CUDA else None


def _ask(pipe: Path) -> bool:
    """Whether somebody reads the pipe, and was asked."""
    try:
        file = os.open(pipe, os.O_WRONLY | os.O_NONBLOCK)
    except OSError:
        # Not made yet, or its rank is gone.
        return False
    try:
        os.write(file, b"1")
    except OSError:
        return False
    finally:
        os.close(file)
    return True


def _has_pipes(folder: Path) -> bool:
    trial = folder / f".{PREFIX}{os.getpid()}.pipe"
    try:
        os.mkfifo(trial)
    except OSError:
        return False
    trial.unlink(missing_ok=True)
    return True
