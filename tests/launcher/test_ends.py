"""Agents of several nodes end together: none goes before the others have written their reports, and none waits for the dead."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator

import pytest
from torch.distributed import TCPStore

from efflaunch.launcher.agent.elastic import LOOPBACK
from efflaunch.launcher.nodes import gather_ends as ends
from efflaunch.launcher.nodes.gather_ends import Ends

NODES = 3


@pytest.fixture
def stores() -> Iterator[list[TCPStore]]:
    """The head's, and those of two agents that are connected to it."""
    made = [TCPStore(LOOPBACK, 0, is_master=True, wait_for_workers=False)]
    made += [TCPStore(LOOPBACK, made[0].port, is_master=False, wait_for_workers=False) for _ in range(NODES - 1)]
    yield made


def agents(stores: list[TCPStore]) -> list[Ends]:
    return [Ends(store, NODES) for store in stores]


def start(work: Callable[[], None]) -> threading.Thread:
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    return thread


def test_nobody_goes_before_the_slowest_has_reported(stores: list[TCPStore], monkeypatch: pytest.MonkeyPatch) -> None:
    """Though noticing was to be a matter of milliseconds: the slow one said that it lives."""
    monkeypatch.setattr(ends, "_NOTICE_S", 0.01)
    first, head, slow = (agents(stores)[node] for node in (1, 0, 2))
    assert not head.failed_elsewhere() and not slow.failed_elsewhere()
    first.tell_failed()
    assert head.failed_elsewhere() and slow.failed_elsewhere()
    waiting = [start(agent.wait_for_others) for agent in (first, head)]
    time.sleep(0.5)
    assert all(thread.is_alive() for thread in waiting)
    slow.wait_for_others()
    for thread in waiting:
        thread.join(10)
    assert not any(thread.is_alive() for thread in waiting)


def test_one_that_was_cut_off_is_not_waited_for(stores: list[TCPStore], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ends, "_NOTICE_S", 0.3)
    head, other, _ = agents(stores)
    other.tell_failed()
    assert head.failed_elsewhere()
    start(head.wait_for_others)
    began = time.monotonic()
    other.wait_for_others()
    assert 0.2 < time.monotonic() - began < ends._END_S / 2


def test_one_that_lives_and_never_ends_is_not_waited_for_long(stores: list[TCPStore], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ends, "_NOTICE_S", 0.01)
    monkeypatch.setattr(ends, "_END_S", 0.3)
    head, other, stuck = agents(stores)
    other.tell_failed()
    assert stuck.failed_elsewhere()
    head.wait_for_others()


def test_a_head_that_is_gone_ends_the_others(stores: list[TCPStore], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ends, "_NOTICE_S", 600.0)
    monkeypatch.setattr(ends, "_END_S", 600.0)
    head, other, _ = agents(stores)
    other.tell_failed()
    thread = start(other.wait_for_others)
    del head
    # The last reference to the store that served them.
    stores.pop(0)
    thread.join(10)
    assert not thread.is_alive() and other.failed_elsewhere()
