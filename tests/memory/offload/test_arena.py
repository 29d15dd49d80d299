"""Blocks never overlap, everything comes back, and what is full says what would help."""

from __future__ import annotations

from itertools import pairwise
from random import Random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from efflaunch.errors import ConfigError, PlanError
from efflaunch.memory.offload.allocator import Extent, Extents
from efflaunch.memory.offload.host_pool import HostArena

KIB = 1024


@given(st.integers(0, 10**6), st.lists(st.integers(1, 12), min_size=1, max_size=4), st.sampled_from([1, 16, 64]))
def test_extents(seed: int, region_blocks: list[int], block: int) -> None:
    """Any order of requests and returns: disjoint, in one region each, counted exactly, refused only where there is too little."""
    random = Random(seed)
    regions = [blocks * block for blocks in region_blocks]
    borders = [sum(regions[: i + 1]) for i in range(len(regions))]
    space = Extents(regions, block)
    held: list[tuple[tuple[Extent, ...], int]] = []
    high_water = 0
    for _ in range(60):
        if held and random.random() < 0.45:
            extents, num_bytes = held.pop(random.randrange(len(held)))
            space.give(extents, num_bytes)
            continue
        num_bytes = random.randint(0, 4 * block)
        before = space.free_bytes
        taken = space.take(num_bytes)
        assert (taken is None) == (space.blocks_for(num_bytes) > before)
        if taken is not None:
            held.append((taken, num_bytes))
        high_water = max(high_water, sum(extent.num_bytes for extents, _ in held for extent in extents))
        check_disjoint([extent for extents, _ in held for extent in extents], borders)
        assert space.used_bytes == sum(extent.num_bytes for extents, _ in held for extent in extents)
        assert space.waste_bytes == space.used_bytes - sum(num_bytes for _, num_bytes in held)
        assert all(sum(extent.num_bytes for extent in extents) - num_bytes < block for extents, num_bytes in held)
    for extents, num_bytes in held:
        space.give(extents, num_bytes)
    assert space.high_water_bytes == high_water
    assert (space.used_bytes, space.asked_bytes, space.free_bytes) == (0, 0, sum(regions))
    assert space.take(sum(regions)) == tuple(
        sorted((Extent(stop - size, size) for stop, size in zip(borders, regions, strict=True)), key=lambda e: (-e.num_bytes, e.start))
    ), "regions are whole again"


def check_disjoint(extents: list[Extent], borders: list[int]) -> None:
    ordered = sorted(extents)
    assert all(a.stop <= b.start for a, b in pairwise(ordered))
    assert all(any(border - extent.stop >= 0 for border in borders) for extent in ordered)
    assert not any(extent.start < border < extent.stop for extent in ordered for border in borders)


def test_the_tightest_run_is_taken_and_several_where_none_is_enough() -> None:
    space = Extents([160], 16)
    a, b, c, d = (space.take(size) for size in (32, 16, 48, 16))
    assert b == (Extent(32, 16),) and space.free_bytes == 48
    for extents, num_bytes in ((a, 32), (c, 48)):
        assert extents is not None
        space.give(extents, num_bytes)
    assert space.take(30) == (Extent(0, 32),), "the tightest that holds it"
    assert space.take(90) == (Extent(48, 48), Extent(112, 48)), "no run of 96, but two of 48"
    assert space.take(1) is None
    assert d is not None


def test_giving_back_twice_is_caught() -> None:
    space = Extents([64], 16)
    extents = space.take(16)
    assert extents is not None
    space.give(extents, 16)
    with pytest.raises(AssertionError, match="given back twice"):
        space.give(extents, 16)


def test_an_arena_holds_exactly_what_was_asked() -> None:
    """No rounding to a power of two: 5 MiB stay 5 MiB."""
    arena = HostArena(5 << 20)
    assert arena.extents.capacity_bytes == 5 << 20
    arena.close()


def test_views_are_the_arenas_own_bytes() -> None:
    arena = HostArena(10 * KIB, block_bytes=KIB, slab_bytes=4 * KIB)
    first, second = arena.take(3 * KIB), arena.take(6 * KIB + 1)
    views = arena.views(second, 6 * KIB + 1)
    assert sum(view.numel() for view in views) == 6 * KIB + 1 and len(views) > 1, "over several slabs"
    for i, view in enumerate(views):
        view.fill_(i + 1)
        assert arena.owns(view.untyped_storage().data_ptr())
        assert bytes(arena.buffer(second[i])[: view.numel()]) == bytes([i + 1]) * view.numel()
    assert all((view == 0).all() for view in arena.views(first, 3 * KIB))
    assert not arena.owns(torch.zeros(8).untyped_storage().data_ptr())
    arena.close()
    assert all((view == i + 1).all() for i, view in enumerate(views)), "who still looks at the memory keeps it"


def test_exhaustion_says_what_would_help() -> None:
    arena = HostArena(64 * KIB, block_bytes=KIB)
    arena.take(60 * KIB)
    with pytest.raises(PlanError) as caught:
        arena.take(5 * KIB)
    assert str(caught.value) == (
        "memory.host_budget: found 5.0 KiB to move with 60.0 KiB of this rank's 64.0 KiB in use; expected room for everything the memory "
        "policy moves.\n  Try: a larger memory.host_budget, memory.offload_dir=DIRECTORY, a smaller memory.host_fraction, or "
        "memory.segment_layers=2 (fewer layer inputs)"
    )
    arena.take(4 * KIB)


def test_a_system_that_refuses_memory() -> None:
    with pytest.raises(ConfigError, match="memory.host_budget: found .* refused by the system"):
        HostArena(1 << 60, slab_bytes=1 << 60)


class RecordingPinner:
    def __init__(self, fails_at: int = -1) -> None:
        self.pinned: dict[int, int] = {}
        self.fails_at = fails_at

    def register(self, address: int, num_bytes: int) -> None:
        if len(self.pinned) == self.fails_at:
            raise ConfigError("memory.host_budget", found="no more", expected="more", hint="less")
        self.pinned[address] = num_bytes

    def unregister(self, address: int) -> None:
        del self.pinned[address]


def test_slabs_are_pinned_once_and_unpinned_at_the_end() -> None:
    pinner = RecordingPinner()
    arena = HostArena(10 * KIB, block_bytes=4 * KIB, slab_bytes=8 * KIB, pinner=pinner)
    assert list(pinner.pinned.values()) == [8 * KIB, 4 * KIB]
    arena.give(arena.take(9 * KIB), 9 * KIB)
    assert len(pinner.pinned) == 2
    arena.close()
    assert pinner.pinned == {}


def test_a_slab_that_cannot_be_pinned_unpins_the_others() -> None:
    pinner = RecordingPinner(fails_at=2)
    with pytest.raises(ConfigError, match="no more"):
        HostArena(16 * KIB, block_bytes=4 * KIB, slab_bytes=4 * KIB, pinner=pinner)
    assert pinner.pinned == {}
