"""Which steps of a run are recorded, planned and replayed. One `StepArena` per rank.

The first step warms up and is left alone. A later step of a shape that has no plan is recorded, if it is the first such or its
shape has come before; its plan is made in a thread beside the steps that follow. Steps whose shape has a plan replay it, and
what the guard sends to the default allocator is counted; a plan that serves too little is made anew from another recording.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Hashable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

from ...units import format_bytes
from ..config import Arena as ArenaKind
from .place import compiled
from .plan import ArenaPlan, plan_arena, spread
from .replay import Arena, Counts, open_cpu_arena
from .search import Budget
from .trace import Trace

log = logging.getLogger(__name__)
MAX_PLANS = 16
"""Shapes that get a plan; further ones use the default allocator."""
MAX_RECORDINGS = 3
"""Most recordings of one shape."""
POOR = 0.1
"""Share of a step's requests the guard turned away from which its plan is made anew."""
COMPILED_BUDGET, PLAIN_BUDGET = Budget(work=300_000_000, wall_s=20.0), Budget(work=3_000_000, wall_s=10.0)
"""Budgets with and without numba; without it planning slows the steps beside it, so it looks at less."""
Report = Callable[..., None]


class StepAllocator(Protocol):
    """What a training loop knows of it."""

    def step(self, shape: Hashable) -> Any:
        """A context: everything of one optimizer step happens inside. `shape` is equal for steps that should allocate alike."""

    def outcome(self) -> dict[str, Any] | None:
        """The last step's entry for metrics.jsonl; None: it has none."""

    def close(self) -> None: ...


class DefaultAllocator:
    """memory.arena=default."""

    @contextmanager
    def step(self, shape: Hashable) -> Iterator[None]:
        yield

    def outcome(self) -> dict[str, Any] | None:
        return None

    def close(self) -> None:
        pass


@dataclass(slots=True)
class _Shape:
    seen: int = 0
    recordings: int = 0
    plan: ArenaPlan | None = None
    pending: Future[ArenaPlan] | None = None


class StepArena:
    """memory.arena=planned. Not for use from several threads."""

    def __init__(self, arena: Arena, report: Report, *, budget: Budget | None = None) -> None:
        """`report(event, **fields)` takes the news: metrics.Metrics.write."""
        self._arena, self._report, self._budget = arena, report, budget
        self._shapes: dict[Hashable, _Shape] = {}
        self._planner = ThreadPoolExecutor(1, thread_name_prefix="arena plan")
        self._closing = threading.Event()
        self._steps = 0
        self._outcome: dict[str, Any] | None = None
        self._modes = dict.fromkeys(("default", "recorded", "replayed"), 0)

    @contextmanager
    def step(self, shape: Hashable) -> Iterator[None]:
        state = self._shapes.setdefault(shape, _Shape())
        self._outcome = None
        self._collect()
        self._steps += 1
        state.seen += 1
        if state.plan is not None and self._has_room(state, state.plan):
            with self._arena.replaying(state.plan):
                yield
            self._replayed(state, state.plan)
        elif self._should_record(state):
            with self._arena.recording():
                yield
            self._recorded(state)
        else:
            yield
            self._outcome = {"mode": "default"}
        assert self._outcome is not None
        self._modes[self._outcome["mode"]] += 1
        self._outcome["steps"] = dict(self._modes)

    def outcome(self) -> dict[str, Any] | None:
        return self._outcome

    def wait(self) -> None:
        """Waits for plans that are being made."""
        for state in self._shapes.values():
            if state.pending is not None:
                state.pending.exception()
        self._collect()

    def close(self) -> None:
        self._closing.set()
        self._planner.shutdown(cancel_futures=True)

    def _should_record(self, state: _Shape) -> bool:
        """Whether this step is recorded; the first of all warms up, and so does the first of a shape once another has a plan."""
        recorded = [other for other in self._shapes.values() if other.recordings]
        if self._steps == 1 or state.pending is not None or state.recordings >= MAX_RECORDINGS:
            return False
        return not recorded or (state.seen > 1 and (state.recordings > 0 or len(recorded) < MAX_PLANS))

    def _recorded(self, state: _Shape) -> None:
        trace = self._arena.trace()
        state.recordings += 1
        state.pending = self._planner.submit(_plan, trace, self._arena.alignment, self._budget, self._closing.is_set)
        self._outcome = {"mode": "recorded", "allocations": len(trace), "max_live_bytes": trace.max_live(self._arena.alignment)}
        self._report("arena", state="recorded", step=self._steps, allocations=len(trace))

    def _collect(self) -> None:
        """Take in the plans that are ready; an error of the planner surfaces here."""
        for state in self._shapes.values():
            if state.pending is not None and state.pending.done():
                plan, state.pending = state.pending.result(), None
                state.plan = plan
                log.info("%s", plan.describe())
                numbers = {"height_bytes": plan.height, "max_live_bytes": plan.max_live}
                self._report("arena", state="planned", step=self._steps, plan=plan.describe(), **numbers)

    def _has_room(self, state: _Shape, plan: ArenaPlan) -> bool:
        """Whether the arena is there; a plan for which the device has no room is given up, and that is said."""
        try:
            return self._arena.reserve(plan.height)
        except MemoryError:
            state.plan, state.recordings = None, MAX_RECORDINGS
            self._report("arena", state="dropped", step=self._steps, reason=f"no room for {format_bytes(plan.height)} at once")
            return False

    def _replayed(self, state: _Shape, plan: ArenaPlan) -> None:
        counts = self._arena.counts()
        self._outcome = {"mode": "replayed", **replay_numbers(plan, counts)}
        if counts.fallback > POOR * max(1, counts.requests) and state.recordings < MAX_RECORDINGS:
            state.plan = None
            turned = f"{counts.fallback} of {counts.requests} requests ({format_bytes(counts.fallback_bytes)}) did not fit the plan"
            self._report("arena", state="dropped", step=self._steps, reason=turned)


def replay_numbers(plan: ArenaPlan, counts: Counts) -> dict[str, int]:
    """Numbers of a replayed step, as metrics.jsonl has them."""
    return {
        "height_bytes": plan.height,
        "max_live_bytes": plan.max_live,
        "served": counts.served,
        "out_of_order": counts.out_of_order,
        "outside": counts.outside,
        "foreign": counts.foreign,
        "fallback": counts.fallback,
        "fallback_peak_bytes": counts.fallback_peak_bytes,
    }


def _plan(trace: Trace, alignment: int, budget: Budget | None, cancelled: Callable[[], bool]) -> ArenaPlan:
    chosen = budget or (COMPILED_BUDGET if compiled() is not None else PLAIN_BUDGET)
    return spread(plan_arena(trace.within(), alignment=alignment, budget=chosen, cancelled=cancelled), trace)


def open_arena(kind: ArenaKind, device: str) -> Arena | None:
    """None for the default allocator. Before anything lives on the device: what is there keeps the allocator it came from.

    ConfigError where the arena cannot be built.
    """
    if kind is ArenaKind.DEFAULT:
        return None
    if device == "cpu":
        return open_cpu_arena()
    from .cuda import open_cuda_arena

    return open_cuda_arena()


def step_allocator(arena: Arena | None, report: Report) -> StepAllocator:
    """What runs steps: with `arena` they are planned, without they are left alone."""
    return DefaultAllocator() if arena is None else StepArena(arena, report)
