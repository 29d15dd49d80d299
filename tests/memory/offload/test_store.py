"""What a store gives back is what it was given, in host memory and in files, from any thread."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from efflaunch.errors import PlanError
from efflaunch.memory.offload.host_store import HostStore, Parcel
from efflaunch.memory.offload.open import open_store

CPU = torch.device("cpu")
KIB = 1024


def open_small(where: str, directory: Path, capacity_bytes: int = 8 << 20) -> HostStore:
    """Files through four buffers of 64 KiB, so that parcels have several pieces."""
    folder = str(directory) if where == "file" else None
    return open_store(device=CPU, capacity_bytes=capacity_bytes, offload_dir=folder, piece_bytes=64 * KIB, staging_bytes=256 * KIB)


@pytest.fixture(params=["memory", "file"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[HostStore]:
    opened = open_small(request.param, tmp_path)
    yield opened
    opened.close()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64, torch.int64, torch.bool, torch.uint8])
@pytest.mark.parametrize("shape", [(), (0, 5), (3,), (257, 130), (2, 3, 4, 5)])
def test_bits_and_shape_come_back(store: HostStore, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    rows = torch.randn(shape).mul(100).to(dtype)
    parcel = store.put(rows)
    assert (parcel.shape, parcel.dtype, parcel.num_bytes) == (rows.shape, dtype, rows.numel() * rows.element_size())
    back = store.get(parcel)
    assert back.dtype == dtype and torch.equal(back, rows) and back.shape == rows.shape
    assert not store.owns(back.untyped_storage().data_ptr())


def test_views_that_are_not_contiguous(store: HostStore) -> None:
    whole = torch.randn(64, 48)
    for rows in (whole[:, 5:9], whole.t(), whole[3:7].t(), whole[::3]):
        assert torch.equal(store.get(store.put(rows)), rows)


def test_the_source_may_be_a_leaf_that_requires_gradients(store: HostStore) -> None:
    back = store.get(store.put(torch.ones(4, requires_grad=True)))
    assert not back.requires_grad and torch.equal(back, torch.ones(4))


def test_a_parcel_can_be_had_again_after_done(store: HostStore) -> None:
    rows = torch.randn(100_000)
    parcel = store.put(rows)
    first = store.get(parcel)
    assert store.get(parcel).data_ptr() == first.data_ptr(), "the same tensor until done"
    first.zero_()
    store.done(parcel)
    store.done(parcel)
    assert torch.equal(store.get(parcel), rows), "what is done to the tensor does not reach the store"
    assert store.stats.bytes_to_device == 2 * rows.nbytes


def test_counts(store: HostStore) -> None:
    rows = torch.zeros(1000)
    parcels = [store.put(rows) for _ in range(3)]
    store.prefetch(parcels[0])
    store.prefetch(parcels[0])
    store.get(parcels[0])
    for parcel in parcels:
        store.drop(parcel)
    stats = store.stats
    assert (stats.bytes_to_host, stats.bytes_to_device) == (12_000, 4_000)
    assert (stats.high_water_bytes, stats.waste_bytes) == (3 * 64 * KIB, 0), "in blocks of 64 KiB"
    store.get(store.put(rows))
    assert store.stats.waste_bytes == 64 * KIB - 4000


def test_dropped_parcels_are_gone(store: HostStore) -> None:
    parcel = store.put(torch.zeros(10))
    store.drop(parcel)
    with pytest.raises(KeyError):
        store.get(parcel)


def test_reset_frees_everything(store: HostStore) -> None:
    rows = torch.zeros((8 << 20) // 4)
    for _ in range(3):
        store.prefetch(store.put(rows))
        store.reset()
    assert store.stats.high_water_bytes == 8 << 20


@pytest.mark.parametrize("where", ["memory", "file"])
@given(seed=st.integers(0, 10**6))
@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_program(where: str, tmp_path: Path, seed: int) -> None:
    random = Random(seed)
    store = open_small(where, tmp_path)
    held: dict[Parcel, Tensor] = {}
    for step in range(40):
        if not held or (random.random() < 0.4 and len(held) < 12):
            rows = torch.full((random.choice([1, 5000, 16384, 100_000]),), float(step))
            held[store.put(rows)] = rows
            continue
        parcel = random.choice(list(held))
        store.prefetch(parcel)
        if random.random() < 0.6:
            assert torch.equal(store.get(parcel), held[parcel])
        if random.random() < 0.5:
            store.done(parcel)
        else:
            store.drop(parcel)
            del held[parcel]
    store.close()


class SquareThroughHost(torch.autograd.Function):
    """x^2, with x on the host in between; remembers the thread of its backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, store: HostStore, threads: list[int]) -> Tensor:
        ctx.store, ctx.parcel, ctx.threads = store, store.put(x), threads
        return x * x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        ctx.threads.append(threading.get_ident())
        x = ctx.store.get(ctx.parcel)
        result = 2 * x * grad
        ctx.store.done(ctx.parcel)
        ctx.store.drop(ctx.parcel)
        return result, None, None


def test_backward_in_another_thread(store: HostStore) -> None:
    """On CUDA autograd runs backward in a thread of its own."""
    x = torch.randn(50_000, dtype=torch.float64, requires_grad=True)
    threads: list[int] = []
    y = SquareThroughHost.apply(SquareThroughHost.apply(x, store, threads), store, threads).sum()
    thread = threading.Thread(target=y.backward)
    thread.start()
    thread.join()
    assert threads and threading.get_ident() not in threads
    assert x.grad is not None
    torch.testing.assert_close(x.grad, 4 * x.detach() ** 3, rtol=1e-12, atol=0)


def test_a_store_that_is_full_takes_nothing(store: HostStore) -> None:
    parcel = store.put(torch.ones((8 << 20) // 4 - 100_000))
    with pytest.raises(PlanError, match="memory.(host_budget|offload_dir)"):
        store.put(torch.zeros(200_000))
    assert store.get(parcel).sum() == (8 << 20) // 4 - 100_000
    store.drop(parcel)
    store.put(torch.zeros(200_000))
