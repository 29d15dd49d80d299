"""Writes what a run reports: metrics.jsonl always, TensorBoard and W&B where asked. Only on rank 0; nothing blocks training.

Note: sinks. TensorBoard and W&B each live in a thread of their own behind a bounded queue, from opening to closing (W&B in
a process besides). A sink that fails is reported once, in the log and as `{"event": "sink_failed"}`, and takes nothing
more; one that cannot keep up loses events and their number is reported at the end. metrics.jsonl has everything in any case.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import math
import os
import queue
import secrets
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

from ...errors import ConfigError
from ...utils.helper_thread import HelperThread
from ...utils.ranges import check_ranges
from .config import LoggingConfig, WandbMode
from .wandb_sink import SinkError, WandbSink

log = logging.getLogger(__name__)
METRICS_FILE = "metrics.jsonl"
QUEUE_EVENTS = 1024
CLOSE_S = 10.0
"""Longest wait for a sink at the end of a run."""


class Sink(Protocol):
    """A destination of scalars besides metrics.jsonl. Called from its own thread only."""

    def write(self, scalars: dict[str, float], step: int) -> None: ...

    def close(self) -> None: ...


def check_logging(config: LoggingConfig) -> None:
    """Raise ConfigError unless the packages of the chosen sinks are installed and the numbers make sense."""
    check_ranges(config, "logging")
    if config.wandb is not WandbMode.OFF:
        _check_installed("wandb", f"logging.wandb={config.wandb.value}", "logging.wandb=off")
    if config.tensorboard:
        _check_installed("tensorboard", "logging.tensorboard=true", "logging.tensorboard=false")


def _check_installed(package: str, where: str, without: str) -> None:
    if importlib.util.find_spec(package) is None:
        hint = f"pip install 'efflaunch[{package}]', or {without}"
        raise ConfigError(where, found=f"no package {package}", expected=f"{package} to be installed", hint=hint)


class Metrics:
    """Writes the events of one attempt of a run. On ranks other than 0 every method does nothing.

    Raises ConfigError where a chosen sink's package is missing; after that, only mistakes of the caller.
    """

    def __init__(
        self,
        run_dir: Path,
        config: LoggingConfig,
        config_dict: dict[str, Any],
        resumed: bool,
        *,
        rank: int = 0,
        sinks: dict[str, Callable[[], Sink]] | None = None,
    ) -> None:
        """`config_dict` is shown by W&B; `resumed` runs append. `sinks` (name to opener) replaces the configured ones."""
        check_logging(config)
        self._lines = _Lines(Path(run_dir) / METRICS_FILE) if rank == 0 else None
        self._sinks: list[_SinkThread] = []
        if rank == 0:
            openers = _openers(Path(run_dir), config, config_dict, resumed) if sinks is None else sinks
            self._sinks = [_SinkThread(name, opener, self._sink_failed) for name, opener in openers.items()]

    def write(self, event: str, **fields: Any) -> None:
        """Appends one line, flushed, with the time; numbers reach the sinks too. Numbers that are not finite become null."""
        if self._lines is None:
            return
        record = {"event": event, "time": time.time(), **fields}
        self._lines.append(record)
        if event in ("step", "eval"):
            scalars = dict(_scalars(fields if event == "step" else fields["metrics"]))
            for sink in self._sinks:
                sink.put(scalars, int(fields["step"]))

    def close(self) -> None:
        """Gives the sinks a last chance to write, at most CLOSE_S seconds together."""
        deadline = time.monotonic() + CLOSE_S
        for sink in self._sinks:
            sink.finish()
        for sink in self._sinks:
            sink.join(max(0.0, deadline - time.monotonic()))
            if sink.dropped:
                self.write("sink_dropped", sink=sink.name, events=sink.dropped)
        self._sinks = []

    def _sink_failed(self, name: str, error: str) -> None:
        log.error("%s receives no more metrics: %s", name, error)
        self.write("sink_failed", sink=name, error=error)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if error is None:
            self.close()
            return
        # The error is not on record yet: whoever writes that waits for the sinks then (HelperThread.is_ending).
        for sink in self._sinks:
            sink.finish()


class _Lines:
    """Appends one JSON object a line. A full disk loses lines, logs so once, and is tried again at the next line."""

    def __init__(self, path: Path) -> None:
        self._path, self._lock, self._lost = path, threading.Lock(), 0
        path.parent.mkdir(parents=True, exist_ok=True)

    def append(self, record: dict[str, Any]) -> None:
        line = json.dumps(_finite(record), allow_nan=False) + "\n"
        with self._lock:
            try:
                self._write(line)
            except OSError as error:
                self._lost += 1
                if self._lost == 1:
                    log.error("%s cannot be written: %s", self._path, error)
            else:
                if self._lost:
                    log.error("%s is written again; %d lines are lost", self._path, self._lost)
                    self._lost = 0

    def _write(self, line: str) -> None:
        with self._path.open("ab") as file:
            if file.tell() and not _ends_with_newline(self._path):
                # Cut off by a crash or a full disk: readers skip that line, not this one too.
                file.write(b"\n")
            file.write(line.encode())


def _ends_with_newline(path: Path) -> bool:
    with path.open("rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read(1) == b"\n"


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return value


def _scalars(fields: dict[str, Any]) -> Iterator[tuple[str, float]]:
    for key, value in fields.items():
        if key != "step" and isinstance(value, (int, float)) and not isinstance(value, bool):
            yield key, float(value)
    for row in fields.get("sources") or []:
        yield from ((f"source/{row['name']}/{key}", float(row[key])) for key in ("loss", "share", "epochs") if row.get(key) is not None)
    peaks = [rank["peak_bytes"] for rank in fields.get("ranks") or [] if rank.get("peak_bytes") is not None]
    if peaks:
        yield "peak_bytes", float(max(peaks))


class _SinkThread:
    """Feeds one sink from its own thread (Note: sinks)."""

    def __init__(self, name: str, opener: Callable[[], Sink], failed: Callable[[str, str], None]) -> None:
        self.name, self.dropped = name, 0
        self._opener, self._failed = opener, failed
        self._queue: queue.Queue[tuple[dict[str, float], int]] = queue.Queue(QUEUE_EVENTS)
        self._closing, self._dead, self._reported = threading.Event(), threading.Event(), threading.Lock()
        self._thread = HelperThread(self._run, f"{name} sink")
        self._thread.start()

    def put(self, scalars: dict[str, float], step: int) -> None:
        if self._dead.is_set():
            return
        try:
            self._queue.put_nowait((scalars, step))
        except queue.Full:
            self.dropped += 1

    def finish(self) -> None:
        """Have the thread write what it was given, and end."""
        self._thread.is_ending = True
        self._closing.set()

    def join(self, timeout_s: float) -> None:
        """Wait for the sink; one that is still busy then has failed, and its thread ends with the process."""
        self._thread.join(timeout_s)
        if self._thread.is_alive():
            self._fail(f"still busy {CLOSE_S:.0f} s after the end of the run")

    def _run(self) -> None:
        try:
            sink = self._opener()
            while (item := self._next()) is not None:
                sink.write(*item)
            sink.close()
        except SinkError as error:
            self._fail(str(error))
        except BaseException as error:  # whatever a logging package raises, SystemExit too, is its own failure, reported, not the run's
            self._fail(f"{type(error).__name__}: {error}")

    def _next(self) -> tuple[dict[str, float], int] | None:
        while True:
            try:
                return self._queue.get(timeout=0.1)
            except queue.Empty:
                if self._closing.is_set():
                    return None

    def _fail(self, error: str) -> None:
        with self._reported:
            if not self._dead.is_set():
                self._dead.set()
                self._failed(self.name, error)


def _openers(run_dir: Path, config: LoggingConfig, config_dict: dict[str, Any], resumed: bool) -> dict[str, Callable[[], Sink]]:
    openers: dict[str, Callable[[], Sink]] = {}
    if config.tensorboard:
        openers["tensorboard"] = lambda: _TensorBoard(run_dir / "tensorboard")
    if config.wandb is not WandbMode.OFF:
        run_id = wandb_run_id(run_dir)
        openers["wandb"] = lambda: _wandb(run_dir, config, config_dict, run_id, resumed)
    return openers


class _TensorBoard:
    def __init__(self, folder: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer: Any = SummaryWriter(str(folder))

    def write(self, scalars: dict[str, float], step: int) -> None:
        for key, value in scalars.items():
            self._writer.add_scalar(f"train/{key}", value, step)

    def close(self) -> None:
        self._writer.close()


def wandb_run_id(run_dir: Path) -> str:
    """The run's W&B id, made at its first start and kept in RUN_DIR/wandb_id."""
    path = run_dir / "wandb_id"
    if not path.exists():
        run_dir.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name("wandb_id.tmp")
        temporary.write_text(secrets.token_hex(4))
        temporary.rename(path)
    return path.read_text().strip()


def _wandb(run_dir: Path, config: LoggingConfig, config_dict: dict[str, Any], run_id: str, resumed: bool) -> Sink:
    """One W&B segment per attempt, all with the same run id; offline segments merge at `wandb sync`."""
    online = config.wandb is WandbMode.ONLINE
    return WandbSink(
        {
            "project": config.wandb_project,
            "name": run_dir.name,
            "id": run_id,
            "dir": str(run_dir),
            "mode": "online" if online else "offline",
            "resume": "allow" if resumed and online else None,
            "config": config_dict,
            # Its system monitor is one more process that outlives a killed run by seconds, and asks the cloud for metadata.
            "settings": {"silent": True, "console": "off", "disable_git": True, "disable_job_creation": True, "x_disable_stats": True},
        }
    )
