"""Tracks one save under way, as its threads see it."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from .archive import FileLayout


@dataclass(frozen=True, slots=True)
class Flushed:
    """The flusher's report on this rank's part of an attempt."""

    error: str | None
    manifest_hash: str = ""
    mode: str = ""
    """`direct` or `buffered`."""
    write_s: float = 0.0


class Attempt:
    """One save from save() to its report. Events only ever go from unset to set."""

    def __init__(self, name: str, step: int, folder: Path, layout: FileLayout, sources: list[Tensor], facts: dict[str, Any]) -> None:
        self.name, self.step, self.folder, self.layout = name, step, folder, layout
        self.sources: list[Tensor] = sources
        self.facts = facts
        """Fields of the manifest."""
        self.texts: list[tuple[str, bytes]] = []
        """Files beside the tensors: `.metadata`, `index.json`, `state.json`."""
        self.started = time.monotonic()
        self.after: Any = None
        """CUDA event: when the sources hold what is to be saved."""
        self.copy_event: Any = None
        self.enqueued = threading.Event()
        """Every copy is done, or ordered on the copy stream."""
        self.copied = threading.Event()
        self.settled = threading.Event()
        """Set once `flushed` is there."""
        self.flushed: Flushed | None = None
        self.cancelled = False
        self.replica: dict[str, Any] | None = None
        """Addresses of the keepers, for the flusher; None: no replica is made."""
        self.replica_settled = threading.Event()
        """Set once `replica_error` is there."""
        self.replica_error: str | None = None
        self.replica_s = 0.0
        """Seconds from save() until this rank's image was at every keeper."""
        self.stall_s = 0.0
        self.snapshot_s = 0.0
        self._lock = threading.Lock()

    @property
    def num_bytes(self) -> int:
        """Bytes that this rank writes, without its manifest."""
        return self.layout.num_bytes + sum(len(text) for _, text in self.texts)

    @property
    def files(self) -> list[tuple[str, int]]:
        return [(self.layout.name, self.layout.num_bytes), *((name, len(text)) for name, text in self.texts)]

    def settle(self, flushed: Flushed) -> None:
        """Record how this rank's part ended; the first call counts, and releases everybody who waits for it."""
        with self._lock:
            if self.flushed is None:
                self.flushed = flushed
        if flushed.error is not None:
            # Nothing will be copied any more.
            self.settle_replica(flushed.error)
            self.enqueued.set()
            self.copied.set()
        self.settled.set()

    def settle_replica(self, error: str | None) -> None:
        """Record how the image ended; None: it is at every keeper. The first call counts."""
        with self._lock:
            if self.replica_settled.is_set():
                return
            self.replica_error, self.replica_s = error, time.monotonic() - self.started
            self.replica_settled.set()
