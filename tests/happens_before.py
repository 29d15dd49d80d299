"""Streams, events and threads with vector clocks: whatever reads or writes watched memory must come after what wrote or read it before.

`Machine` stands in for torch.cuda in modules that use it. Work is done at once, by the CPU; what counts is only which orders the program
asks for: an access that no wait puts behind a conflicting one before it is a race, whichever of the two came first this time. Device
memory is reused at once in the order of the stream that allocated it, as torch's allocator does. (Vector clocks: Mattern 1989.)
"""

from __future__ import annotations

import contextlib
import queue
import threading
import weakref
from collections.abc import Iterator
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

Clock = dict[str, int]


@dataclass(frozen=True)
class Access:
    """Bytes [start, stop) of the process's memory, used by an actor at a time of its own."""

    start: int
    stop: int
    writes: bool
    actor: str
    time: int

    def __str__(self) -> str:
        return f"{'write' if self.writes else 'read'} by {self.actor}"


@dataclass
class Region:
    """Memory that is watched."""

    name: str
    start: int
    stop: int
    on_device: bool
    accesses: list[Access] = field(default_factory=list)


class Machine:
    """Actors are streams and threads; `answer`: what events say when they are asked whether they are done."""

    def __init__(self, *, answer: bool = False) -> None:
        self.answer, self.races, self.num_accesses = answer, list[str](), 0
        self._clocks: dict[str, Clock] = {}
        self._regions: list[Region] = []
        self._kept: list[np.ndarray] = []
        self._free: dict[tuple[str, int], list[tuple[np.ndarray, Clock]]] = {}
        self._lock, self._current, self._num_streams = threading.RLock(), threading.local(), 0
        self.compute = Stream(self, "compute")
        self.torch = FakeTorch(self)

    # Order.

    @property
    def thread(self) -> str:
        return f"thread {threading.current_thread().name}"

    @property
    def stream(self) -> Stream:
        return getattr(self._current, "stream", self.compute)

    def clock(self, actor: str) -> Clock:
        return self._clocks.setdefault(actor, {})

    def join(self, actor: str, other: Clock) -> None:
        """What the actor does from now on comes after `other`."""
        with self._lock:
            mine = self.clock(actor)
            for name, time in list(other.items()):
                mine[name] = max(mine.get(name, 0), time)

    def seen(self, actor: str) -> Clock:
        """All that is before the actor's next work; a stream's is enqueued by this thread."""
        with self._lock:
            self.join(actor, self.clock(self.thread))
            return dict(self.clock(actor))

    @contextlib.contextmanager
    def on(self, stream: Stream) -> Iterator[None]:
        before = self.stream
        self._current.stream = stream
        try:
            yield
        finally:
            self._current.stream = before

    # Memory.

    def watch(self, name: str, tensor: Tensor, *, on_device: bool) -> Tensor:
        start = tensor.data_ptr()
        self._regions.append(Region(name, start, start + tensor.numel() * tensor.element_size(), on_device))
        return tensor

    def tensor(self, num_bytes: int) -> Tensor:
        """Device memory of the current stream, what was freed last first."""
        with self._lock:
            key = (self.stream.name, num_bytes)
            free = self._free.setdefault(key, [])
            new = not free
            block, freed = (np.zeros(num_bytes, dtype=np.uint8), {}) if new else free.pop()
            # The allocator's lock: who allocates comes after who freed, and what that thread has waited for.
            self.join(self.thread, freed)
            tensor = torch.from_numpy(block)
            if new:
                self._kept.append(block)
                self.watch(f"device memory {len(self._kept)} of {self.stream.name}", tensor, on_device=True)
            weakref.finalize(tensor.untyped_storage(), lambda: free.append((block, self.seen(self.thread))))
            return tensor

    def touch(self, tensor: Tensor, *, writes: bool, actor: str | None = None) -> None:
        start = tensor.data_ptr()
        stop = start + tensor.numel() * tensor.element_size()
        with self._lock:
            for region in self._regions:
                if region.start < stop and start < region.stop:
                    self._access(region, start, stop, writes, actor or self.thread)

    def _access(self, region: Region, start: int, stop: int, writes: bool, actor: str) -> None:
        self.num_accesses += 1
        seen = self.seen(actor)
        time = self.clock(actor)[actor] = seen.get(actor, 0) + 1
        access, kept = Access(start, stop, writes, actor, time), []
        for other in region.accesses:
            overlaps = other.start < stop and start < other.stop
            before = seen.get(other.actor, 0) >= other.time
            if overlaps and not before and (writes or other.writes):
                self.races.append(f"{region.name}: {access} is not ordered after {other}")
            if not (writes and before and start <= other.start and other.stop <= stop):
                kept.append(other)
        region.accesses = [*kept, access]

    def is_device(self, tensor: Tensor) -> bool:
        return any(region.on_device and region.start <= tensor.data_ptr() < region.stop for region in self._regions)

    def watching(self) -> TorchDispatchMode:
        """While it is entered, this thread's operations are accesses: a stream's where device memory is among them, else the thread's."""
        machine = self

        class Watch(TorchDispatchMode):
            def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
                machine.operation(func, args, kwargs or {})
                return func(*args, **(kwargs or {}))

        return Watch()

    def operation(self, func: Any, args: Any, kwargs: Any) -> None:
        if func.is_view:
            return
        names = [argument.name for argument in func._schema.arguments]
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        written = {each.name for each in func._schema.arguments if each.alias_info is not None and each.alias_info.is_write}
        used = [(each, name in written) for name, value in given.items() for each in _tensors(value)]
        actor = self.stream.name if any(self.is_device(tensor) for tensor, _ in used) else self.thread
        # Reads come first: an operation that writes what it reads is no race of its own.
        for tensor, writes in sorted(used, key=lambda use: use[1]):
            self.touch(tensor, writes=writes, actor=actor)


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for each in value:
            yield from _tensors(each)


class Stream:
    """torch.cuda.Stream."""

    def __init__(self, machine: Machine, name: str) -> None:
        self.machine, self.name = machine, name

    def record_event(self) -> Any:
        event = self.machine.torch.cuda.Event()
        event.record(self)
        return event

    def wait_event(self, event: Event) -> None:
        self.machine.join(self.name, event.clock)

    def wait_stream(self, stream: Stream) -> None:
        self.machine.join(self.name, self.machine.seen(stream.name))

    def synchronize(self) -> None:
        self.machine.join(self.machine.thread, self.machine.seen(self.name))


class Event:
    """torch.cuda.Event."""

    machine: Machine

    def __init__(self, **_: Any) -> None:
        self.clock: Clock = {}

    def record(self, stream: Stream) -> None:
        self.clock = self.machine.seen(stream.name)

    def query(self) -> bool:
        if self.machine.answer:
            self.synchronize()
        return self.machine.answer

    def synchronize(self) -> None:
        self.machine.join(self.machine.thread, self.clock)

    def elapsed_time(self, other: Event) -> float:
        return 0.0


class FakeTorch:
    """torch, with a machine's streams and events, and memory that is watched."""

    def __init__(self, machine: Machine) -> None:
        self._machine = machine
        ok = SimpleNamespace(cudaHostRegister=lambda *_: 0, cudaHostUnregister=lambda *_: 0)
        self.cuda = SimpleNamespace(
            Stream=self._stream, Event=type("Event", (Event,), {"machine": machine}), current_stream=lambda device=None: machine.stream,
            stream=machine.on, cudart=lambda: ok, set_device=lambda device: None,
        )  # fmt: skip

    def _stream(self, device: torch.device) -> Stream:
        self._machine._num_streams += 1
        return Stream(self._machine, f"stream {self._machine._num_streams}")

    def empty(self, *shape: int, dtype: torch.dtype, device: torch.device | None = None) -> Tensor:
        if device is not None and device.type == "cuda":
            return self._machine.tensor(shape[0] * dtype.itemsize).view(dtype)
        return self._machine.watch("a host buffer", torch.empty(*shape, dtype=dtype), on_device=False)

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


def clocked_queue(machine: Machine) -> SimpleNamespace:
    """The module queue, whose queues carry order from who puts to who gets, and from who is done to who joins."""

    class Queue(queue.Queue):  # type: ignore[type-arg]
        def __init__(self) -> None:
            super().__init__()
            self.done: Clock = {}

        def put(self, item: Any, *_: Any, **__: Any) -> None:
            super().put((item, machine.seen(machine.thread)))

        def get(self, *_: Any, **__: Any) -> Any:
            item, clock = super().get()
            machine.join(machine.thread, clock)
            return item

        def task_done(self) -> None:
            for name, time in machine.seen(machine.thread).items():
                self.done[name] = max(self.done.get(name, 0), time)
            super().task_done()

        def join(self) -> None:
            super().join()
            machine.join(machine.thread, self.done)

    return SimpleNamespace(Queue=Queue)


def clocked_threading(machine: Machine) -> SimpleNamespace:
    """The module threading, whose locks and semaphores carry order from who releases to who acquires."""

    class Semaphore:
        def __init__(self, value: int = 1) -> None:
            self.inner, self.clock = threading.Semaphore(value), Clock()

        def acquire(self) -> None:
            self.inner.acquire()
            machine.join(machine.thread, self.clock)

        def release(self) -> None:
            for name, time in machine.seen(machine.thread).items():
                self.clock[name] = max(self.clock.get(name, 0), time)
            self.inner.release()

        def __enter__(self) -> None:
            self.acquire()

        def __exit__(self, *_: object) -> None:
            self.release()

    return SimpleNamespace(Semaphore=Semaphore, Lock=Semaphore, RLock=threading.RLock)
