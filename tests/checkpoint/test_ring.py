"""The segments of the snapshot pool: never two uses of the same bytes, whatever the order of hand-outs and releases."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from efflaunch.checkpoint.provenance import free_memory
from efflaunch.checkpoint.segment_pool import SegmentPool, StaleTicketError, Ticket
from efflaunch.checkpoint.sizes import MIN_SEGMENTS, snapshot_pool_bytes


@given(num_segments=st.integers(1, 6), actions=st.lists(st.integers(0, 9), max_size=80))
def test_live_segments_never_overlap_and_stale_releases_are_refused(num_segments: int, actions: list[int]) -> None:
    ring, live, stale = SegmentPool(num_segments), [], []
    for action in actions:
        if action < 5 and ring.num_free:
            ticket = ring.acquire()
            assert ticket is not None and ticket.segment not in {other.segment for other in live}
            assert ticket not in stale
            live.append(ticket)
        elif action < 8 and live:
            ticket = live.pop(action % len(live))
            ring.release(ticket)
            stale.append(ticket)
        elif action == 8 and stale:
            with pytest.raises(StaleTicketError):
                ring.release(stale[-1])
        elif action == 9:
            ring.reset()
            stale, live = stale + live, []
        assert ring.num_free == num_segments - len(live)


def test_waiting_ends_with_a_release_or_when_given_up() -> None:
    ring = SegmentPool(1)
    held = ring.acquire()
    assert held == Ticket(0, 1)
    assert ring.acquire(lambda: True) is None
    threading.Timer(0.05, ring.release, (held,)).start()
    assert ring.acquire() == Ticket(0, 2)


@given(state=st.integers(1, 1 << 40), wanted=st.none() | st.integers(1, 1 << 41), free=st.none() | st.integers(0, 1 << 41))
def test_pool_sizes(state: int, wanted: int | None, free: int | None) -> None:
    segment = 1 << 20
    size = snapshot_pool_bytes(state, wanted, free_bytes=free, segment=segment)
    assert size % segment == 0 and size >= MIN_SEGMENTS * segment
    assert size <= state + (MIN_SEGMENTS + 1) * segment
    if wanted is None and free is None:
        assert size >= state
    if wanted is None and free is not None:
        assert size <= max(MIN_SEGMENTS * segment, free // 2 + segment)


def test_free_memory_is_that_of_the_container_where_it_has_less(tmp_path: Path) -> None:
    (tmp_path / "meminfo").write_text("MemTotal:       16 kB\nMemAvailable:    8 kB\n")
    assert free_memory(tmp_path / "meminfo", tmp_path) == 8192
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.current").write_text("1000\n")
    assert free_memory(tmp_path / "meminfo", tmp_path) == 8192
    (tmp_path / "memory.max").write_text("5000\n")
    assert free_memory(tmp_path / "meminfo", tmp_path) == 4000
