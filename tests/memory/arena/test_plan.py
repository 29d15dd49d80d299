"""The planner: valid on anything, as low as it says, the same every time."""

from __future__ import annotations

from dataclasses import replace
from itertools import permutations
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from efflaunch.errors import DataError
from efflaunch.memory.arena import search as search_module
from efflaunch.memory.arena.instances import read_instance
from efflaunch.memory.arena.place import compiled
from efflaunch.memory.arena.plan import OUTSIDE, ArenaPlan, check_plan, plan_arena, spread
from efflaunch.memory.arena.search import Budget
from efflaunch.memory.arena.simulate import MIB, reserved_bytes
from efflaunch.memory.arena.trace import Trace, trace_of
from efflaunch.tests.limits import ENDS_S

SMALL = Budget(work=200_000, wall_s=ENDS_S)
BLOCKS = st.lists(st.tuples(st.integers(1, 300), st.integers(0, 20), st.integers(1, 20)), min_size=1, max_size=24)


def blocks(rows: list[tuple[int, int, int]]) -> Trace:
    """(size, birth, life)."""
    sizes, births, lives = zip(*rows, strict=True)
    return Trace(sizes, births, tuple(a + b for a, b in zip(births, lives, strict=True)), 41)


def overlaps(plan: ArenaPlan, trace: Trace) -> bool:
    """Every pair, the slow and obvious way."""
    spans = [(o, o + -(-s // plan.alignment) * plan.alignment) for o, s in zip(plan.offsets, plan.sizes, strict=True)]
    return any(
        trace.births[i] < trace.deaths[j] and trace.births[j] < trace.deaths[i] and spans[i][0] < spans[j][1] and spans[j][0] < spans[i][1]
        for i in range(len(trace))
        for j in range(i)
    )


@settings(max_examples=150, deadline=None)
@given(BLOCKS, st.sampled_from([1, 2, 64]), st.booleans())
def test_no_two_live_blocks_share_addresses(rows: list[tuple[int, int, int]], alignment: int, compile_loops: bool) -> None:
    trace = blocks(rows)
    plan = plan_arena(trace, alignment=alignment, budget=SMALL, compile_loops=compile_loops)
    check_plan(plan, trace)
    assert not overlaps(plan, trace)
    assert all(offset % alignment == 0 for offset in plan.offsets)
    assert plan.height >= plan.max_live == trace.max_live(alignment)


@pytest.mark.skipif(compiled() is None, reason="numba is not installed")
@settings(max_examples=25, deadline=None)
@given(BLOCKS)
def test_compiled_and_plain_loops_make_the_same_plan(rows: list[tuple[int, int, int]]) -> None:
    trace = blocks(rows)
    assert plan_arena(trace, budget=SMALL, compile_loops=False) == plan_arena(trace, budget=SMALL)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 9), st.integers(0, 5), st.integers(1, 5)), min_size=1, max_size=5))
def test_small_instances_are_solved(rows: list[tuple[int, int, int]]) -> None:
    """Against the best of all orders, placed by hand at the lowest gap: some order gives an optimum."""
    trace = blocks(rows)
    assert plan_arena(trace, budget=SMALL).height == min(first_fit(trace, order) for order in permutations(range(len(trace))))


def first_fit(trace: Trace, order: tuple[int, ...]) -> int:
    placed: dict[int, int] = {}
    for i in order:
        mates = [j for j in placed if trace.births[i] < trace.deaths[j] and trace.births[j] < trace.deaths[i]]
        edges = sorted({0, *(placed[j] + trace.sizes[j] for j in mates)})
        placed[i] = next(
            e for e in edges if all(e + trace.sizes[i] <= placed[j] or placed[j] + trace.sizes[j] <= e for j in mates)
        )  # fmt: skip
    return max(placed[i] + trace.sizes[i] for i in placed)


def test_a_gap_that_greedy_orders_leave_is_closed() -> None:
    """Local search reaches the lower bound, and says that nothing is lower."""
    import random

    generator = random.Random(2)
    trace = blocks([(generator.randint(1, 60), generator.randint(0, 18), generator.randint(1, 22)) for _ in range(30)])
    greedy = plan_arena(trace, budget=Budget(work=0))
    searched = plan_arena(trace, budget=Budget(work=5_000_000, wall_s=ENDS_S))
    assert searched.height < greedy.height and searched.ratio == 1.0
    assert "local search" in searched.method and "the least there is" in searched.describe()
    assert greedy.work > 0 and "above the least" in greedy.describe()
    assert searched == plan_arena(trace, budget=Budget(work=5_000_000, wall_s=ENDS_S)), "the same every time"


def test_many_pairs_are_planned_without_lists(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(search_module, "MAX_PAIRS", 10)
    trace = blocks([(1 + index % 7, index % 13, 5 + index % 9) for index in range(60)])
    plan = plan_arena(trace, budget=SMALL)
    assert "in order of" in plan.method and not overlaps(plan, trace)


def test_a_cancelled_plan_is_what_was_found() -> None:
    trace = blocks([(1 + index % 7, index % 13, 5 + index % 9) for index in range(60)])
    plan = plan_arena(trace, cancelled=lambda: True)
    check_plan(plan, trace)
    assert "in order of birth" in plan.method


def test_what_outlives_the_step_stays_outside() -> None:
    trace = trace_of([(1, 64), (2, 128), (1, 0), (3, 64), (3, 0)])
    plan = spread(plan_arena(trace.within(), alignment=64), trace)
    assert plan.offsets == (0, OUTSIDE, 0) and plan.height == 64 and plan.num_planned == 2
    assert plan.describe().endswith("1 more outlive the step and stay outside")
    check_plan(plan, trace)


def test_an_empty_trace() -> None:
    plan = plan_arena(Trace((), (), (), 0))
    assert (plan.height, plan.max_live, plan.ratio, plan.offsets) == (0, 0, 1.0, ())


def test_bad_plans_are_found() -> None:
    trace = trace_of([(1, 64), (2, 64), (1, 0), (2, 0)])
    good = plan_arena(trace, alignment=64)
    check_plan(good, trace)
    for changes, message in (
        ({"offsets": (0, 0)}, "share addresses"),
        ({"offsets": (0, 32)}, "misaligned"),
        ({"offsets": (0, 128)}, "outside an arena of 128 bytes"),
        ({"sizes": (64, 32)}, "another trace"),
    ):
        with pytest.raises(ValueError, match=message):
            check_plan(replace(good, **changes), trace)


def test_instances_in_minimallocs_format(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("id,lower,upper,size\nx,10,30,4\ny,30,40,4\nz,10,40,2\n")
    trace = read_instance(path)
    assert trace == Trace((4, 4, 2), (0, 1, 0), (1, 2, 2), 2), "lifetimes are half open"
    assert plan_arena(trace).height == 6
    for text in ("id,lower,size\n1,2,3\n", "id,lower,upper,size\n1,5,5,1\n", "id,lower,upper,size\n1,a,5,1\n", "id,lower,upper,size\n"):
        path.write_text(text)
        with pytest.raises(DataError, match="lines of id,lower,upper,size"):
            read_instance(path)


def test_the_simulated_allocators() -> None:
    """By hand: 3 MiB take a 20 MiB segment of the caching allocator, 1 KiB a small one of 2 MiB; 30 MiB one of their own."""
    trace = trace_of([(1, 3 * MIB), (2, 1024), (1, 0), (2, 0), (3, 30 * MIB), (3, 0)])
    assert reserved_bytes(trace, expandable=False) == 52 * MIB
    assert reserved_bytes(trace, expandable=True) == 42 * MIB, "the 20 MiB grow to 40"
    hole = trace_of([(1, 12 * MIB), (2, 12 * MIB), (1, 0), (3, 14 * MIB), (2, 0), (3, 0)])
    assert reserved_bytes(hole, expandable=False) == 38 * MIB, "the hole of 12 does not hold 14"
    assert reserved_bytes(hole, expandable=True, steps=1) == 40 * MIB
