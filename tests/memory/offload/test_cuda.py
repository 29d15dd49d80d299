"""CUDA's side: on a GPU where there is one, and call by call on stand-ins where there is none."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import astuple
from typing import Any

import pytest
import torch

from efflaunch.errors import ConfigError
from efflaunch.memory.offload import cuda
from efflaunch.memory.offload.cuda import CudaDevice, CudaPinner
from efflaunch.memory.offload.host_pool import HostArena
from efflaunch.memory.offload.host_store import ArenaStore
from efflaunch.memory.offload.measure_bandwidth import measure_host_link
from efflaunch.memory.offload.open import open_store

on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


class StandInEvent:
    """Passes once `synchronize` or a later look has been at it: work is done at once here, only the calls are watched."""

    calls: list[str] = []  # noqa: RUF012

    def __init__(self, enable_timing: bool = False) -> None:
        self.stream = ""

    def record(self, stream: StandInStream) -> None:
        self.stream = stream.name

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        return None

    def elapsed_time(self, other: StandInEvent) -> float:
        return 2.0


class StandInStream:
    names: list[str] = []  # noqa: RUF012

    def __init__(self, device: Any = None) -> None:
        self.name = self.names.pop(0)

    def wait_event(self, event: StandInEvent) -> None:
        StandInEvent.calls.append(f"{self.name} waits for {event.stream}")

    def record_event(self) -> StandInEvent:
        event = StandInEvent()
        event.record(self)
        return event


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """torch.cuda with stand-ins for streams and events; what waits for what."""
    StandInStream.names[:] = ["compute", "out", "in", "other"]
    StandInEvent.calls.clear()
    compute = StandInStream()

    @contextmanager
    def stream(entered: StandInStream) -> Iterator[None]:
        StandInEvent.calls.append(f"on {entered.name}")
        yield

    monkeypatch.setattr(torch.cuda, "Stream", StandInStream)
    monkeypatch.setattr(torch.cuda, "Event", StandInEvent)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: compute)
    monkeypatch.setattr(torch.cuda, "stream", stream)
    return StandInEvent.calls


def test_what_waits_for_what(calls: list[str]) -> None:
    device = CudaDevice(torch.device("cpu"))
    store = ArenaStore(HostArena(1 << 20), device, 1 << 20)
    rows = torch.randn(100)
    parcel = store.put(rows)
    assert calls == ["out waits for compute", "on out"]
    calls.clear()
    store.prefetch(parcel)
    assert calls == ["on in", "in waits for out", "on in"], "the buffer belongs to that stream, the copy waits for the one out"
    calls.clear()
    assert torch.equal(store.get(parcel), rows)
    assert calls == ["compute waits for in"]
    calls.clear()
    store.done(parcel)
    assert calls == ["in waits for compute"]
    assert (store.stats.waits, store.stats.wait_s) == (1, 0.002), "as the events say"


def test_another_compute_stream_is_refused(calls: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    device = CudaDevice(torch.device("cpu"))
    device.mark()
    other = StandInStream()
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: other)
    with pytest.raises(AssertionError, match="one compute stream"):
        device.mark()


class StandInRuntime:
    def __init__(self, code: int) -> None:
        self.code = code

    def cudaHostRegister(self, address: int, num_bytes: int, flags: int) -> int:
        return self.code


@pytest.mark.parametrize(("limit", "said", "tip"), [(8 << 20, "8.0 MiB", True), (resource.RLIM_INFINITY, "unlimited", False)])
def test_memory_that_cannot_be_pinned(monkeypatch: pytest.MonkeyPatch, limit: int, said: str, tip: bool) -> None:
    monkeypatch.setattr(torch.cuda, "cudart", lambda: StandInRuntime(2))
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextmanager(lambda: iter([None]))())
    monkeypatch.setattr(cuda.resource, "getrlimit", lambda _: (limit, limit))
    with pytest.raises(ConfigError) as caught:
        HostArena(1 << 20, pinner=CudaPinner(torch.device("cuda", 0)))
    assert f"found CUDA cannot pin 1.0 MiB of host memory (error 2; ulimit -l is {said})" in str(caught.value)
    assert ("`ulimit -l unlimited`" in str(caught.value)) == tip


GPU = torch.device("cuda", 0)


@on_gpu
def test_bits_come_back_while_memory_is_used_again() -> None:
    """Each source's memory is overwritten by compute as soon as it is free, each landing buffer's by the next copy."""
    store = open_store(device=GPU, capacity_bytes=1 << 28, in_flight_bytes=8 << 20)
    for _ in range(3):
        parcels = []
        for i in range(32):
            parcels.append(store.put(torch.full((1 << 20,), float(i), device=GPU)))
            torch.full((1 << 20,), -1.0, device=GPU)
        sums = []
        for i in reversed(range(32)):
            store.prefetch(parcels[i])
            if i:
                store.prefetch(parcels[i - 1])
            tensor = store.get(parcels[i])
            torch.randn(2048, 2048, device=GPU).mm(torch.randn(2048, 2048, device=GPU))
            sums.append((tensor - i).abs().sum())
            del tensor
            store.done(parcels[i])
            store.drop(parcels[i])
        assert torch.stack(sums).sum().item() == 0.0
    assert store.stats.bytes_to_host == store.stats.bytes_to_device == 3 * 32 * (4 << 20)
    store.close()


@on_gpu
def test_the_arena_is_pinned_and_copies_do_not_block() -> None:
    arena = HostArena(1 << 26, pinner=CudaPinner(GPU))
    (view,) = arena.views(arena.take(1 << 26), 1 << 26)
    assert view.is_pinned()
    del view
    arena.close()


@on_gpu
def test_device_memory_is_bounded() -> None:
    store = open_store(device=GPU, capacity_bytes=1 << 28, in_flight_bytes=8 << 20)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    for _ in range(32):
        store.put(torch.zeros(1 << 20, device=GPU))
    assert torch.cuda.max_memory_allocated() - before <= (8 << 20) + 2 * (4 << 20)
    store.close()


@on_gpu
def test_the_link_of_a_gpu() -> None:
    link = measure_host_link(GPU, 0.5)
    assert min(astuple(link)) > 1e9
