"""Time of a graph of tasks on streams: a discrete-event simulation by rates, with contention. Loops that numba compiles.

Each stream runs one task at a time. `strict`: in the order of its keys, as streams of a GPU do; else whichever ready task has the least
key, never idle while one is ready. A task on resource x advances at 1 / (1 + sum of slow[3 x + y] over other busy resources y).

`pool` = (resource, alpha_s, element_s, elements, layers, stretch): reductions that are no tasks but a pool. The gradient of every layer,
`elements`, joins it when it is complete; whenever the pool's links would idle, as much of it is sent as fits before the earliest next
task there, looked up with `stretch` of that gap; what remains after the last such task is sent at once. `elements` 0: no pool.

All is in two tables with a column for each task (`ints`, `floats`), and two vectors for what there is once (`now`, `clock`).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numpy as np

from ...utils.numba_jit import compile_functions

RESOURCE, NEED_END, GRADIENT, STREAM, WAITS, DONE, TURN, FOLLOWER_END, READY = range(9)
"""Rows of `ints`. From READY on, one for each stream: those that wait for it; strict, all of them in order."""
SECONDS, KEY, START, STOP, FINISH = range(5)
"""Rows of `floats`; FINISH is scratch of the look-ahead."""
RUNNING, READY_COUNT, HEAD, LEFT, LOWEST, WHOLE, TURNS, SENDS = 0, 3, 6, 9, 10, 11, 12, 13
"""Places in `now`, the first three with one for each stream. LOWEST is the least task not done, WHOLE counts complete gradients."""
REMAINING, SLOWED, NOW, SENT = 0, 3, 6, 7
"""Places in `clock`, the first two with one for each stream: seconds of work left, and times as long as alone."""
PIECE_ELEMENTS, PIECE_START, PIECE_STOP, PIECE_TURN, PIECE_HIGH = range(5)
"""Rows of `sends`."""
IDLE, PIECE = -1, -2
"""What a stream runs that runs no task."""
LOOK_AHEAD = 24
"""Tasks of the pool's links among which the earliest is looked for."""
DONE_S = 1e-13
"""Seconds of work that count as none."""


def first_need(task: int, ints: Any) -> int:
    """Where the needs of a task begin."""
    return ints[NEED_END, task - 1] if task > 0 else 0


def add_followers(ints: Any, need: Any) -> Any:
    """Set FOLLOWER_END, and return the tasks that wait for each, laid out as needs are."""
    count = ints.shape[1]
    filled = np.zeros(count + 1, np.int64)
    for at in range(len(need)):
        filled[need[at] + 1] += 1
    for task in range(count):
        filled[task + 1] += filled[task]
        ints[FOLLOWER_END, task] = filled[task + 1]
    follower = np.empty(len(need), np.int64)
    for task in range(count):
        for at in range(first_need(task, ints), ints[NEED_END, task]):
            follower[filled[need[at]]] = task
            filled[need[at]] += 1
    return follower


def make_ready(task: int, ints: Any, now: Any) -> None:
    """Put a task at the end of its stream's list."""
    stream = ints[STREAM, task]
    ints[READY + stream, now[READY_COUNT + stream]] = task
    now[READY_COUNT + stream] += 1


def begin(order: Any, strict: bool, ints: Any, now: Any, gradient_waits: Any) -> None:
    """Set what there is before anything runs. `order` are the tasks by key."""
    now[LEFT] = ints.shape[1]
    for stream in range(3):
        now[RUNNING + stream] = IDLE
    for task in range(ints.shape[1]):
        ints[WAITS, task] = ints[NEED_END, task] - first_need(task, ints)
        if ints[GRADIENT, task] >= 0:
            gradient_waits[ints[GRADIENT, task]] += 1
    for at in range(len(order)):
        if strict or ints[WAITS, order[at]] == 0:
            make_ready(order[at], ints, now)


def gap_s(resource: int, ints: Any, floats: Any, need: Any, now: Any, clock: Any) -> float:
    """Least seconds until a task on `resource` can start, by needs alone; -1 where no task is left there."""
    lowest = now[LOWEST]
    least, looked = -1.0, 0
    for task in range(lowest, ints.shape[1]):
        if ints[DONE, task] == 1:
            floats[FINISH, task] = 0.0
            continue
        stream = ints[STREAM, task]
        if now[RUNNING + stream] == task:
            floats[FINISH, task] = clock[REMAINING + stream]
            continue
        start = 0.0
        for at in range(first_need(task, ints), ints[NEED_END, task]):
            # Tasks before the lowest one that is not done are done.
            if need[at] >= lowest and floats[FINISH, need[at]] > start:
                start = floats[FINISH, need[at]]
        floats[FINISH, task] = start + floats[SECONDS, task]
        if ints[RESOURCE, task] == resource:
            if least < 0 or start < least:
                least = start
            looked += 1
            if looked == LOOK_AHEAD:
                break
    return least


def piece_of(held: float, gap: float, pool: Any) -> float:
    """Elements to send now, 0 for none: all where nothing else comes, else what fits, if that pays for its start."""
    if gap < 0:
        return held
    fits = (gap * pool[5] - pool[1]) / pool[2]
    if fits >= held:
        return held
    return fits if fits * pool[2] >= pool[1] else 0.0


def next_task(stream: int, strict: bool, ints: Any, floats: Any, now: Any) -> int:
    """Take the task that a free stream runs now out of those that wait; -1 where it has to idle."""
    count, row = now[READY_COUNT + stream], READY + stream
    if strict:
        head = now[HEAD + stream]
        if head < count and ints[WAITS, ints[row, head]] == 0:
            now[HEAD + stream] += 1
            return ints[row, head]
        return -1
    if count == 0:
        return -1
    best = 0
    for at in range(1, count):
        key, least = floats[KEY, ints[row, at]], floats[KEY, ints[row, best]]
        if key < least or (key == least and ints[row, at] < ints[row, best]):
            best = at
    task = ints[row, best]
    ints[row, best] = ints[row, count - 1]
    now[READY_COUNT + stream] -= 1
    return task


def start_piece(pool: Any, ints: Any, floats: Any, need: Any, now: Any, clock: Any, sends: Any) -> None:
    """Send some of the pool where its links idle."""
    links, held = int(pool[0]), now[WHOLE] * pool[3] - clock[SENT]
    if now[RUNNING + links] != IDLE or held < 0.5:
        return
    gap = gap_s(links, ints, floats, need, now, clock)
    # There is room for a piece a task and a layer; no plan comes near it.
    elements = piece_of(held, gap, pool) if gap < 0 or now[SENDS] < ints.shape[1] else 0.0
    if elements > 0:
        now[RUNNING + links], clock[REMAINING + links] = PIECE, pool[1] + elements * pool[2]
        at = now[SENDS]
        sends[PIECE_ELEMENTS, at], sends[PIECE_START, at] = elements, clock[NOW]
        sends[PIECE_TURN, at], sends[PIECE_HIGH, at] = now[TURNS], now[WHOLE] - 1
        now[TURNS] += 1
        clock[SENT] += elements


def start_tasks(strict: bool, ints: Any, floats: Any, now: Any, clock: Any) -> None:
    """Start what can start now."""
    for stream in range(3):
        if now[RUNNING + stream] == IDLE:
            task = next_task(stream, strict, ints, floats, now)
            if task >= 0:
                now[RUNNING + stream], clock[REMAINING + stream] = task, floats[SECONDS, task]
                floats[START, task], ints[TURN, task] = clock[NOW], now[TURNS]
                now[TURNS] += 1


def finish_task(task: int, strict: bool, ints: Any, follower: Any, now: Any, gradient_waits: Any) -> None:
    """Mark a task as done, and what waited for it alone as ready."""
    ints[DONE, task] = 1
    now[LEFT] -= 1
    if ints[GRADIENT, task] >= 0:
        gradient_waits[ints[GRADIENT, task]] -= 1
    for at in range(ints[FOLLOWER_END, task - 1] if task > 0 else 0, ints[FOLLOWER_END, task]):
        ints[WAITS, follower[at]] -= 1
        if ints[WAITS, follower[at]] == 0 and not strict:
            make_ready(follower[at], ints, now)
    while now[LOWEST] < ints.shape[1] and ints[DONE, now[LOWEST]] == 1:
        now[LOWEST] += 1
    while now[WHOLE] < len(gradient_waits) - 1 and gradient_waits[now[WHOLE]] == 0:
        now[WHOLE] += 1


def next_end_s(links: int, slow: Any, ints: Any, now: Any, clock: Any) -> float:
    """Set by how much each stream is slowed down, and return the seconds until the first ends; -1 where nothing runs."""
    busy = 0
    for stream in range(3):
        task = now[RUNNING + stream]
        if task != IDLE:
            busy |= 1 << (links if task == PIECE else ints[RESOURCE, task])
    step = -1.0
    for stream in range(3):
        task = now[RUNNING + stream]
        if task == IDLE:
            continue
        resource = links if task == PIECE else ints[RESOURCE, task]
        factor = 1.0
        for other in range(3):
            if other != resource and busy >> other & 1:
                factor += slow[3 * resource + other]
        clock[SLOWED + stream] = factor
        if step < 0 or clock[REMAINING + stream] * factor < step:
            step = clock[REMAINING + stream] * factor
    return step


def run(
    resource: Any, seconds: Any, need_end: Any, need: Any, gradient: Any, stream: Any, key: Any, strict: bool, slow: Any, pool: Any
) -> Any:
    """(seconds, ints, floats, sends) of a graph (see graph.py); seconds are -1 where the orders wait for each other for ever.

    START, STOP and TURN (which counts starts over all streams) are in the tables. A piece's PIECE_HIGH is the last layer whose
    gradient it may hold.
    """
    count, layers = len(seconds), int(pool[4])
    ints, floats = np.zeros((READY + 3, count), np.int64), np.zeros((5, count))
    now, clock, sends = np.zeros(14, np.int64), np.zeros(8), np.zeros((5, count + layers + 1))
    for task in range(count):
        ints[RESOURCE, task], ints[NEED_END, task], ints[STREAM, task] = resource[task], need_end[task], stream[task]
        ints[GRADIENT, task] = gradient[task] if layers > 0 else -1
        floats[SECONDS, task], floats[KEY, task] = seconds[task], key[task]
    follower, gradient_waits = add_followers(ints, need), np.zeros(layers + 1, np.int64)
    order = np.argsort(key, kind="mergesort") if strict else np.arange(count)
    begin(order, strict, ints, now, gradient_waits)
    while True:
        start_tasks(strict, ints, floats, now, clock)
        if layers > 0:
            start_piece(pool, ints, floats, need, now, clock, sends)
        step = next_end_s(int(pool[0]), slow, ints, now, clock)
        if step < 0:
            break
        clock[NOW] += step
        for stream_at in range(3):
            task = now[RUNNING + stream_at]
            if task == IDLE:
                continue
            clock[REMAINING + stream_at] -= step / clock[SLOWED + stream_at]
            if clock[REMAINING + stream_at] > DONE_S:
                continue
            now[RUNNING + stream_at] = IDLE
            if task == PIECE:
                sends[PIECE_STOP, now[SENDS]] = clock[NOW]
                now[SENDS] += 1
            else:
                floats[STOP, task] = clock[NOW]
                finish_task(task, strict, ints, follower, now, gradient_waits)
    return clock[NOW] if now[LEFT] == 0 else -1.0, ints, floats, sends[:, : now[SENDS]]


FUNCTIONS = (
    *(first_need, add_followers, make_ready, begin, gap_s, piece_of, next_task, start_piece, start_tasks, finish_task, next_end_s),
    run,
)


@lru_cache(maxsize=1)
def runner() -> Callable[..., Any]:
    """`run`, through numba where that is installed."""
    namespace = compile_functions(FUNCTIONS, globals())
    return run if namespace is None else namespace["run"]
