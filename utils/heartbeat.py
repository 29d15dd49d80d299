"""Position of a rank, readable without its help: a block of shared memory for each rank of a node, and a file for its stacks.

A rank writes a beat whenever it enters another phase, layer or step: one copy of some bytes into memory, one or two microseconds,
with no file, lock or message. Its node's agent reads beats and times their silence itself, so a rank that is blocked, stopped or
spinning is seen as well. The memory has no name and goes with the agent; ranks open it through the agent's own descriptors.

Note: stacks. Each rank opens its stack file at its start and has faulthandler write all its Python threads there whenever
`STACKS_SIGNAL` comes: in C, without the interpreter's lock. It is a signal nothing else uses: SIGUSR1 NCCL may catch, SIGUSR2 asks for
a save. Only the agent sends it, and only to a rank that listens (`catches`).
"""

from __future__ import annotations

import faulthandler
import mmap
import os
import signal
import struct
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

STACKS_SIGNAL = signal.SIGRTMIN + 7 if hasattr(signal, "SIGRTMIN") else signal.SIGUSR1
_BEAT = struct.Struct("<QqiidQ64sQ")
_SIZE = 256
"""Bytes of a rank's block."""
_TRIES = 100

Memory = bytearray | mmap.mmap


@dataclass(frozen=True, kw_only=True, slots=True)
class Beat:
    """Last beat of a rank: step, phase, layer, and how long it may take."""

    count: int
    """Beats of this rank so far."""
    step: int
    """Finished updates."""
    layer: int | None
    is_long: bool
    """True in a phase that may take long whatever a step takes: starting, the first step, saving, scoring."""
    expected_s: float
    """Expected seconds of a step; zero where unknown yet."""
    thread: int
    """threading.get_ident() of its main thread, as stacks name it."""
    phase: str

    def __str__(self) -> str:
        where = self.phase if self.layer is None else f"{self.phase} of layer {self.layer}"
        return f"{where}, after step {self.step}"


class Heartbeat:
    """A rank's side. Without `memory` it beats for itself alone."""

    def __init__(self, memory: Memory | None = None, offset: int = 0) -> None:
        self._memory: Memory = memory if memory is not None else bytearray(_SIZE)
        self._offset, self._count, self._step, self._expected_s = offset, 0, 0, 0.0
        self._is_long = True
        self._thread = threading.get_ident()

    def at(self, phase: str, layer: int | None = None) -> None:
        """Announce the phase, and layer, the rank is in from now on. A long phase stays one."""
        self._count += 1
        count, where = self._count, -1 if layer is None else layer
        beat = (count, self._step, where, self._is_long, self._expected_s, self._thread, phase.encode()[:64], count)
        _BEAT.pack_into(self._memory, self._offset, *beat)

    def begin_step(self, done: int, *, expected_s: float, is_long: bool = False) -> None:
        """The step after `done` of them begins; `is_long`: the first of a start, in which everything is new."""
        self._step, self._expected_s, self._is_long = done, expected_s, is_long
        self.at("planning")

    def expect(self, step_s: float) -> None:
        """Set how long this step is expected to take, once its plan says; sent with the next beat."""
        self._expected_s = step_s

    @contextmanager
    def long(self, phase: str) -> Iterator[None]:
        """A phase whose length has nothing to do with a step's."""
        before = self._is_long
        self._is_long = True
        self.at(phase)
        try:
            yield
        finally:
            self._is_long = before
            self.at(f"after {phase}")


def read_beat(memory: Memory, offset: int = 0) -> Beat | None:
    """The newest beat; None before the first, or where the rank is in the middle of writing one."""
    for _ in range(_TRIES):
        count, step, layer, is_long, expected_s, thread, phase, again = _BEAT.unpack_from(memory, offset)
        if count == again:
            break
        time.sleep(0)
    else:
        return None
    if not count:
        return None
    text = phase.rstrip(b"\0").decode("utf-8", "replace")
    where = None if layer < 0 else layer
    return Beat(count=count, step=step, layer=where, is_long=bool(is_long), expected_s=expected_s, thread=thread, phase=text)


class HeartbeatBoard:
    """An agent's side: the blocks of `num_ranks` ranks and their stack files, for one attempt. To be closed."""

    def __init__(self, num_ranks: int) -> None:
        self.num_ranks = num_ranks
        self._file = _nameless("efflaunch-pulse", num_ranks * _SIZE)
        self._memory = mmap.mmap(self._file, num_ranks * _SIZE)
        self._stacks = [_nameless(f"efflaunch-stacks-{rank}", 0) for rank in range(num_ranks)]

    def place(self) -> str:
        """Return what a rank needs to `attach`, on a command line or through a fork: the descriptors of this process."""
        return " ".join(_reachable(file) for file in (self._file, *self._stacks))

    def beat(self, local_rank: int) -> Beat | None:
        """The newest beat of a rank, by its number on this node."""
        return read_beat(self._memory, local_rank * _SIZE)

    def stacks(self, local_rank: int) -> str:
        """All that faulthandler wrote for the rank so far."""
        file = self._stacks[local_rank]
        return os.pread(file, os.fstat(file).st_size, 0).decode("utf-8", "replace")

    def close(self) -> None:
        self._memory.close()
        for file in (self._file, *self._stacks):
            os.close(file)


def attach(place: str, local_rank: int) -> Heartbeat:
    """A rank's pulse on its agent's board, with its stacks ready to be asked for. The descriptors stay open with the process."""
    board, *stacks = place.split()
    file = os.open(board, os.O_RDWR)
    try:
        memory = mmap.mmap(file, os.fstat(file).st_size)
    finally:
        os.close(file)
    faulthandler.register(STACKS_SIGNAL, file=os.open(stacks[local_rank], os.O_WRONLY | os.O_APPEND), all_threads=True)
    pulse = Heartbeat(memory, local_rank * _SIZE)
    pulse.at("starting")
    return pulse


def catches(pid: int, number: int) -> bool:
    """Return whether the process has a handler for the signal, without which it would die of it. False where unknown."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False
    masks = [line.split()[1] for line in status.splitlines() if line.startswith("SigCgt:")]
    return bool(masks) and bool(int(masks[0], 16) >> (number - 1) & 1)


def _nameless(name: str, size: int) -> int:
    """A file of no directory. In memory where the system has that: a full disk must not kill who writes through a mapping."""
    if hasattr(os, "memfd_create"):
        file = os.memfd_create(name)
    else:
        with tempfile.TemporaryFile() as opened:
            file = os.dup(opened.fileno())
    os.pwrite(file, bytes(size), 0)
    return file


def _reachable(file: int) -> str:
    """A path other processes of this user can open; on systems without /proc only those that were forked from this one."""
    path = f"/proc/{os.getpid()}/fd/{file}"
    return path if os.path.exists(path) else f"/dev/fd/{file}"
