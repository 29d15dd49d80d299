"""Which steps are recorded, planned and replayed; with a stand-in for the allocator."""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from efflaunch.memory.arena.plan import ArenaPlan
from efflaunch.memory.arena.replay import Counts
from efflaunch.memory.arena.search import Budget
from efflaunch.memory.arena.step import MAX_PLANS, DefaultAllocator, StepArena, open_arena, step_allocator
from efflaunch.memory.arena.trace import Trace, trace_of
from efflaunch.memory.config import Arena

TRACE = trace_of([(1, 64), (2, 128), (1, 0), (2, 0), (3, 64)])


class FakeArena:
    """Serves all but `fallback` requests."""

    alignment = 64

    def __init__(self) -> None:
        self.fallback, self.room, self.did = 0, 1 << 40, "default"

    def trace(self) -> Trace:
        return TRACE

    def reserve(self, num_bytes: int) -> bool:
        if num_bytes > self.room:
            raise MemoryError
        return True

    @contextmanager
    def recording(self) -> Iterator[None]:
        self.did = "recorded"
        yield

    @contextmanager
    def replaying(self, plan: ArenaPlan) -> Iterator[None]:
        self.did = "replayed"
        yield

    def counts(self) -> Counts:
        return Counts(2 - self.fallback, 0, 1, 4, self.fallback, 100 * self.fallback, 64, 192)


class Steps:
    def __init__(self) -> None:
        self.arena, self.news = FakeArena(), list[dict[str, Any]]()
        self.allocator = StepArena(self.arena, self.report, budget=Budget(work=1000))  # type: ignore[arg-type]

    def report(self, event: str, **fields: Any) -> None:
        assert event == "arena"
        self.news.append(fields)

    def step(self, shape: Hashable) -> str:
        self.arena.did = "default"
        with self.allocator.step(shape):
            pass
        self.allocator.wait()
        outcome = self.allocator.outcome()
        assert outcome is not None and outcome["mode"] == self.arena.did
        return self.arena.did


def test_one_shape() -> None:
    steps = Steps()
    assert [steps.step("a") for _ in range(4)] == ["default", "recorded", "replayed", "replayed"]
    assert steps.allocator.outcome() == {
        "mode": "replayed", "height_bytes": 192, "max_live_bytes": 192, "served": 2, "out_of_order": 0, "outside": 1, "foreign": 4,
        "fallback": 0, "fallback_peak_bytes": 64, "steps": {"default": 1, "recorded": 1, "replayed": 2},
    }  # fmt: skip
    assert [news["state"] for news in steps.news] == ["recorded", "planned"]
    assert "arena of 192 B for 2 allocations, the least there is" in steps.news[1]["plan"]


def test_a_shape_that_comes_again_gets_its_own_plan() -> None:
    steps = Steps()
    assert [steps.step(shape) for shape in "aabbcabb"] == [
        "default", "recorded", "default", "recorded", "default", "replayed", "replayed", "replayed"
    ]  # fmt: skip


def test_shapes_without_end() -> None:
    steps = Steps()
    done = [steps.step(index // 3) for index in range(3 * (MAX_PLANS + 5))]
    assert done.count("recorded") == MAX_PLANS and set(done[-12:]) == {"default"}


def test_a_plan_that_serves_too_little_is_replaced_three_times_at_most() -> None:
    steps = Steps()
    steps.arena.fallback = 1
    assert [steps.step("a") for _ in range(9)] == ["default", *["recorded", "replayed"] * 3, "replayed", "replayed"]
    dropped = [news["reason"] for news in steps.news if news["state"] == "dropped"]
    assert dropped == ["1 of 3 requests (100 B) did not fit the plan"] * 2


def test_an_arena_without_room_is_given_up_and_said() -> None:
    steps = Steps()
    steps.arena.room = 100
    assert [steps.step("a") for _ in range(5)] == ["default", "recorded", "default", "default", "default"]
    assert steps.news[-1] == {"state": "dropped", "step": 3, "reason": "no room for 192 B at once"}


def test_a_step_that_fails_makes_no_plan() -> None:
    steps = Steps()
    steps.step("a")
    with pytest.raises(RuntimeError), steps.allocator.step("a"):
        raise RuntimeError
    assert steps.step("a") == "recorded"
    steps.allocator.close()


def test_the_default_does_nothing() -> None:
    assert open_arena(Arena.DEFAULT, "cpu") is None
    allocator = step_allocator(None, lambda event, **fields: None)
    assert isinstance(allocator, DefaultAllocator)
    with allocator.step("a"):
        pass
    assert allocator.outcome() is None
    allocator.close()
