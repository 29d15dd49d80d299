"""Agents of several nodes end together: none goes before the others have written their reports, and none waits for the dead."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator

import pytest
from torch.distributed import TCPStore

from efflaunch.launcher.agent.elastic import LOOPBACK
from efflaunch.launcher.nodes import gather_ends as ends
from efflaunch.launcher.nodes.gather_ends import Ends
from efflaunch.tests.limits import ENDS_S, wait_until

NODES = 3


@pytest.fixture
def stores() -> Iterator[list[TCPStore]]:
    """The head's, and those of two agents that are connected to it."""
    made = [TCPStore(LOOPBACK, 0, is_master=True, wait_for_workers=False)]
    made += [TCPStore(LOOPBACK, made[0].port, is_master=False, wait_for_workers=False) for _ in range(NODES - 1)]
    yield made


class Clock:
    """Stands still but for what each look at it adds."""

    def __init__(self, step_s: float = 0.0) -> None:
        self.now_s, self.step_s, self.looks = 0.0, step_s, 0

    def __call__(self) -> float:
        self.looks += 1
        self.now_s += self.step_s
        return self.now_s


def agents(stores: list[TCPStore], clock: Clock) -> list[Ends]:
    return [Ends(store, NODES, clock=clock) for store in stores]


def start(work: Callable[[], None]) -> threading.Thread:
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    return thread


def test_nobody_goes_before_the_slowest_has_reported(stores: list[TCPStore]) -> None:
    """Though the time for noticing is over: the slow one said that it lives."""
    clock = Clock()
    head, first, slow = agents(stores, clock)
    assert not head.failed_elsewhere() and not slow.failed_elsewhere()
    first.report_failed()
    assert head.failed_elsewhere() and slow.failed_elsewhere()
    waiting = [start(agent.wait_for_others) for agent in (first, head)]
    clock.now_s += (ends._NOTICE_S + ends._END_S) / 2
    looks = clock.looks
    wait_until(lambda: clock.looks > looks + 6, "nobody looks at the clock")
    assert all(thread.is_alive() for thread in waiting)
    slow.wait_for_others()
    for thread in waiting:
        thread.join(ENDS_S)
    assert not any(thread.is_alive() for thread in waiting)


def test_one_that_was_cut_off_is_not_waited_for(stores: list[TCPStore]) -> None:
    """Longer than noticing may take, and not until the time for ending is over."""
    clock = Clock()
    head, other, _ = agents(stores, clock)
    other.report_failed()
    assert head.failed_elsewhere()
    waiting = start(head.wait_for_others)
    wait_until(lambda: other._count("ended") == 1, "the head has not reported")
    clock.step_s = 1.0
    other.wait_for_others()
    waiting.join(ENDS_S)
    assert not waiting.is_alive() and ends._NOTICE_S < clock.now_s < ends._END_S


def test_one_that_lives_and_never_ends_is_not_waited_for_long(stores: list[TCPStore]) -> None:
    clock = Clock()
    head, other, stuck = agents(stores, clock)
    other.report_failed()
    assert stuck.failed_elsewhere()
    clock.step_s = 5.0
    head.wait_for_others()
    assert ends._END_S < clock.now_s <= ends._END_S + 15.0


def test_a_head_that_is_gone_ends_the_others(stores: list[TCPStore]) -> None:
    head, other, _ = agents(stores, Clock())
    other.report_failed()
    thread = start(other.wait_for_others)
    del head
    # The last reference to the store that served them.
    stores.pop(0)
    thread.join(ENDS_S)
    assert not thread.is_alive() and other.failed_elsewhere()
