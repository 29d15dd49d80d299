"""Inner loops of the arena planner: blocks into an address range, in a given order. Only indexing and arithmetic on arrays.

The same source runs compiled by numba where that is installed, and as plain Python without it; both make the same plan.

Legend: block i has sizes[i] units and lives in [births[i], deaths[i]); `neighbours[starts[i]:starts[i + 1]]` are the blocks it
shares a moment with; offsets[i] is its address, -1 while it has none. FIRST takes the lowest gap, BEST the tightest one.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from ...utils.numba_jit import compile_functions

FIRST, BEST = 0, 1
FEW = 48
"""Ranges that are sorted in place; more are given to numpy."""


def gap_at(taken: Any, ends: Any, count: int, size: int, fit: int) -> int:
    """Address for `size` units beside `count` ranges [taken, ends) in ascending order; they may overlap each other."""
    edge, best, best_gap = 0, -1, 0
    # `edge` is the highest end so far, not the last one's: ranges of blocks that never live together overlap, and a gap
    # between two of them may lie under a third.
    for k in range(count):
        gap = taken[k] - edge
        # Strictly less: of equal gaps the lowest wins, compiled or not.
        if gap >= size and (best < 0 or gap < best_gap):
            best, best_gap = edge, gap
            if fit == 0:
                break
        edge = max(edge, ends[k])
    return best if best >= 0 else edge


def sort_few(lows: Any, ends: Any, count: int) -> None:
    """Sort ranges by insertion, in place: an argsort would allocate for each block."""
    for k in range(1, count):
        low, end, j = lows[k], ends[k], k - 1
        while j >= 0 and lows[j] > low:
            lows[j + 1], ends[j + 1] = lows[j], ends[j]
            j -= 1
        lows[j + 1], ends[j + 1] = low, end


def put_block(block: int, fit: int, sizes: Any, starts: Any, neighbours: Any, offsets: Any, space: Any) -> int:
    """Give `block` an address beside its neighbours that have one; returns the neighbours looked at."""
    lows, taken, ends = space
    count = 0
    for k in range(starts[block], starts[block + 1]):
        other = neighbours[k]
        if offsets[other] >= 0:
            lows[count] = offsets[other]
            ends[count] = offsets[other] + sizes[other]
            count += 1
    if count < FEW:
        sort_few(lows, ends, count)
        offsets[block] = gap_at(lows, ends, count, sizes[block], fit)
    else:
        # Equal lows may come in any order: gap_at takes the highest end before it, so the address is the same.
        order = np.argsort(lows[:count])
        taken[:count] = lows[order]
        lows[:count] = ends[order]
        offsets[block] = gap_at(taken, lows, count, sizes[block], fit)
    return starts[block + 1] - starts[block] + 1


def put_all(order: Any, first: int, fit: int, limit: int, sizes: Any, starts: Any, neighbours: Any, offsets: Any, space: Any) -> Any:
    """Place order[first:] beside order[:first], which have addresses; stops above `limit`. Returns (height, neighbours looked at)."""
    height, work = 0, 0
    for k in range(first):
        height = max(height, offsets[order[k]] + sizes[order[k]])
    # All addresses go before the first is given: a later block's old one must not be in an earlier block's way.
    for k in range(first, len(order)):
        offsets[order[k]] = -1
    for k in range(first, len(order)):
        block = order[k]
        work += put_block(block, fit, sizes, starts, neighbours, offsets, space)
        height = max(height, offsets[block] + sizes[block])
        if height > limit:
            break
    return height, work


def next_random(state: Any) -> int:
    """xorshift with 31 bits of result: the same numbers compiled or not."""
    x = state[0]
    # The masks keep Python's unbounded integers within what int64 holds, so that both make the same plan.
    x ^= (x << 13) & 0x7FFFFFFFFFFFFFFF
    x ^= x >> 7
    x ^= (x << 17) & 0x7FFFFFFFFFFFFFFF
    state[0] = x
    return (x >> 11) & 0x7FFFFFFF


def search(
    order: Any, best: Any, fit: int, state: Any, allowed: int, sizes: Any, starts: Any, neighbours: Any, offsets: Any, space: Any
) -> int:
    """Move a block that reaches too high to an earlier place in the order, and keep what is no higher.

    state: random state, height of `order`, height of `best`, lower bound; `best` is the order of the lowest placement seen.
    Returns the neighbours looked at, about `allowed`.
    """
    n, work = len(order), 0
    tries, trial, before = np.empty(n, np.int64), np.empty(n, np.int64), np.empty(n, np.int64)
    while work < allowed and state[2] > state[3]:
        high = 0
        edge = state[1] - (next_random(state) % 4) * max(1, (state[1] - state[3]) // 3)
        for k in range(1, n):
            block = order[k]
            if offsets[block] + sizes[block] >= edge:
                tries[high] = k
                high += 1
        # Three in four sources reach too high; the rest, and targets behind their source, keep every order within reach.
        work += n // 8 + 1
        source = tries[next_random(state) % high] if high > 0 and next_random(state) % 4 else next_random(state) % n
        target = next_random(state) % (source + 1) if next_random(state) % 8 else next_random(state) % n
        if source == target:
            continue
        trial[:] = order
        block = order[source]
        if target < source:
            trial[target + 1 : source + 1] = order[target:source]
        else:
            trial[source:target] = order[source + 1 : target + 1]
        trial[target] = block
        # Blocks before the first change see the same neighbours, and keep their addresses.
        first = min(source, target)
        before[:] = offsets
        # Now and then something a little worse is kept: the way out of a dead end.
        slack = (state[2] - state[3]) // 8 if next_random(state) % 64 == 0 else 0
        height, looked = put_all(trial, first, fit, state[1] + slack, sizes, starts, neighbours, offsets, space)
        work += looked
        if height <= state[1] + slack:
            order[:] = trial
            state[1] = height
            if height < state[2]:
                state[2] = height
                best[:] = trial
        else:
            offsets[:] = before
    return work


def count_pairs(events: Any) -> int:
    """Pairs of blocks that share a moment; `events` has a block's number + 1 at its birth, minus that at its death."""
    live, pairs = 0, 0
    for k in range(len(events)):
        if events[k] > 0:
            pairs += live
            live += 1
        else:
            live -= 1
    return pairs


def fill_pairs(events: Any, starts: Any, neighbours: Any, cursor: Any, live: Any, where: Any) -> None:
    """First call with an empty `neighbours` counts into cursor; the second, with `starts` made of that, fills `neighbours`."""
    count, filling = 0, len(neighbours) > 0
    for k in range(len(events)):
        if events[k] < 0:
            block = -events[k] - 1
            count -= 1
            live[where[block]] = live[count]
            where[live[count]] = where[block]
            continue
        block = events[k] - 1
        for j in range(count):
            other = live[j]
            if filling:
                neighbours[starts[block] + cursor[block]] = other
                neighbours[starts[other] + cursor[other]] = block
            cursor[block] += 1
            cursor[other] += 1
        live[count] = block
        where[block] = count
        count += 1


def sweep(events: Any, fit: int, sizes: Any, offsets: Any, taken: Any, ends: Any) -> Any:
    """Every block at its birth, beside what lives then, without lists of neighbours. Returns (height, ranges looked at)."""
    count, height, work = 0, 0, 0
    for k in range(len(events)):
        if events[k] < 0:
            low = offsets[-events[k] - 1]
            place = np.searchsorted(taken[:count], low)
            for j in range(place, count - 1):
                taken[j] = taken[j + 1]
                ends[j] = ends[j + 1]
            count -= 1
        else:
            block = events[k] - 1
            low = gap_at(taken, ends, count, sizes[block], fit)
            place = np.searchsorted(taken[:count], low)
            for j in range(count, place, -1):
                taken[j] = taken[j - 1]
                ends[j] = ends[j - 1]
            taken[place], ends[place], offsets[block] = low, low + sizes[block], low
            count += 1
            height = max(height, low + sizes[block])
        work += count
    return height, work


class Kernels(NamedTuple):
    put_all: Callable[..., Any]
    search: Callable[..., Any]
    count_pairs: Callable[..., Any]
    fill_pairs: Callable[..., Any]
    sweep: Callable[..., Any]


PLAIN = Kernels(put_all, search, count_pairs, fill_pairs, sweep)
FUNCTIONS = (gap_at, sort_few, put_block, put_all, next_random, search, count_pairs, fill_pairs, sweep)


@lru_cache(maxsize=1)
def compiled() -> Kernels | None:
    """Through numba, which lets other threads run meanwhile; None where it is not installed."""
    namespace = compile_functions(FUNCTIONS, globals(), nogil=True)
    if namespace is None:
        return None
    kernels = Kernels(*(namespace[name] for name in Kernels._fields))
    _warm_up(kernels)
    return kernels


def _warm_up(kernels: Kernels) -> None:
    """Machine code is made at the first call: here, so that no budget of time pays for it."""

    def numbers(*values: int) -> Any:
        return np.array(values, dtype=np.int64)

    sizes, starts, neighbours, events = numbers(1, 1), numbers(0, 1, 2), np.array([1, 0], dtype=np.int32), numbers(1, 2, -1, -2)
    space, offsets = tuple(numbers(0, 0) for _ in range(3)), numbers(-1, -1)
    kernels.put_all(numbers(0, 1), 0, FIRST, 9, sizes, starts, neighbours, offsets, space)
    state = numbers(1, 2, 2, 1)
    kernels.search(numbers(0, 1), numbers(0, 1), FIRST, state, 1, sizes, starts, neighbours, offsets, space)
    kernels.count_pairs(events)
    kernels.fill_pairs(events, starts, neighbours[:0], numbers(0, 0), numbers(0, 0), numbers(0, 0))
    kernels.sweep(events, FIRST, sizes, offsets, numbers(0, 0), numbers(0, 0))
