"""The tracer counts bytes that can be counted by hand."""

from __future__ import annotations

import torch

from efflaunch.memory.arena.tracer import StorageTracer

KIB = 1024


def floats(kib: int) -> torch.Tensor:
    return torch.zeros(kib * KIB // 4)


def test_live_and_peak_bytes() -> None:
    weight = floats(4)
    with StorageTracer([weight]) as tracer:
        a = weight + 1
        view = a[10:]
        b = a * 2
        del a
        assert tracer.live_bytes == 12 * KIB, "a view keeps its storage alive"
        del view
        assert tracer.live_bytes == 8 * KIB
        c = floats(1)
        del b, c
    assert tracer.peak_bytes == 12 * KIB
    assert tracer.live_bytes == 4 * KIB
    assert [change for change, _ in tracer.events] == [4096, 4096, 4096, -4096, 1024, -4096, -1024]


def test_resized_storages_count_what_they_hold() -> None:
    """FSDP2 frees gathered weights this way."""
    with StorageTracer() as tracer:
        a = floats(8)
        a.untyped_storage().resize_(0)
        assert tracer.live_bytes == 0
        b = floats(2)
        a.untyped_storage().resize_(8 * KIB)
        assert tracer.live_bytes == 10 * KIB
        del a, b
    assert (tracer.live_bytes, tracer.peak_bytes) == (0, 10 * KIB)


def test_saved_activations_live_until_backward() -> None:
    x = torch.ones(KIB, requires_grad=True)

    def loss() -> torch.Tensor:
        return (x.exp().exp()).sum()

    loss().backward()
    x.grad = None
    with StorageTracer([x]) as tracer:
        y = loss()
        assert tracer.live_bytes == 3 * 4 * KIB + 4, "x, both exponentials and the sum"
        y.backward()
        del y
        assert x.grad is not None and tracer.live_bytes == 2 * 4 * KIB


def test_two_traces_are_the_same() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 1))

    def events() -> list[tuple[int, str]]:
        with StorageTracer(model.parameters()) as tracer:
            model(torch.ones(32, 64)).sum().backward()
            model.zero_grad()
        return tracer.events

    events()
    assert events() == events()


def test_the_patch_is_undone_after_an_error() -> None:
    before = torch.UntypedStorage.resize_
    try:
        with StorageTracer():
            raise ValueError
    except ValueError:
        pass
    assert torch.UntypedStorage.resize_ is before


def test_what_was_there_at_the_peak() -> None:
    with StorageTracer() as tracer:
        a = floats(8)
        b = a + a
        del a, b
    assert tracer.peak_by_maker() == [("aten.zeros.default", 1, 8 * KIB), ("aten.add.Tensor", 1, 8 * KIB)]
