"""Inner loops of the planner: one micro-batch filled longest-first. Only indexing and arithmetic on flat tables.

The same source runs on numpy arrays, compiled by numba where that is installed, and on plain lists without it; both make the
same plan. `rem` holds positions of sequences in descending length; tables with two axes are flat: [sequence * num_degrees + degree].

`tables` = (lengths, times, first, degrees, capacity, rates, offsets):
    lengths[k], first[k]    tokens, and the smallest degree (as an index) whose group can hold them
    times[k, d]             seconds the sequence adds to a group of degree d
    degrees[d], capacity[d] ranks and tokens of a group
    rates[d]                least seconds a token can take
    offsets[d]              where the groups of this degree start in `shelf`'s keys and ids
`space` = (keys, ids, count, group_degree, group_tokens, group_load): scratch. Per degree, ids are its groups ordered by keys, the
tokens a group can surely not exceed.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

from ...utils.numba_jit import compile_functions

LENGTHS, TIMES, FIRST, DEGREES, CAPACITY, RATES, OFFSETS = range(7)
KEYS, IDS, COUNT, GROUP_DEGREE, GROUP_TOKENS, GROUP_LOAD = range(6)
"""Places in `tables` and in `space`."""
TRIES = 12
"""Groups looked at from the best fit upwards, for one whose time is not used up."""
WIDEST = 9.0e15
"""Below 2**53: a float that becomes an integer key without loss, where a token takes next to no time."""


def lower_bound(keys: Any, low: int, high: int, value: int) -> int:
    """First place in keys[low:high], ascending, with a key of at least `value`."""
    while low < high:
        middle = (low + high) // 2
        if keys[middle] < value:
            low = middle + 1
        else:
            high = middle
    return low


def take_best_fit(k: int, d: int, limit: float, tables: Any, space: Any) -> int:
    """Take the tightest group of degree d that holds sequence k out of the order, and return it; -1 where none does."""
    lengths, times, degrees, offsets = tables[LENGTHS], tables[TIMES], tables[DEGREES], tables[OFFSETS]
    keys, ids, count, group_load = space[KEYS], space[IDS], space[COUNT], space[GROUP_LOAD]
    base = offsets[d]
    end = base + count[d]
    place = lower_bound(keys, base, end, lengths[k])
    time = times[k * len(degrees) + d]
    stop = min(end, place + TRIES)
    while place < stop:
        group = ids[place]
        if group_load[group] + time <= limit:
            for j in range(place, end - 1):
                keys[j] = keys[j + 1]
                ids[j] = ids[j + 1]
            count[d] -= 1
            return group
        place += 1
    return -1


def put(k: int, group: int, limit: float, tables: Any, space: Any) -> float:
    """Add sequence k to a group that is in no order now, and put it back into its degree's order; its load."""
    lengths, times, degrees, capacity, rates, offsets = (
        tables[LENGTHS],
        tables[TIMES],
        tables[DEGREES],
        tables[CAPACITY],
        tables[RATES],
        tables[OFFSETS],
    )
    keys, ids, count, group_degree, group_tokens, group_load = (
        space[KEYS],
        space[IDS],
        space[COUNT],
        space[GROUP_DEGREE],
        space[GROUP_TOKENS],
        space[GROUP_LOAD],
    )
    d = group_degree[group]
    group_tokens[group] += lengths[k]
    group_load[group] += times[k * len(degrees) + d]
    # A key may say too much, never too little: by time it is what the cheapest tokens would take, rounded up. take_best_fit
    # checks the true time, so a sequence that fits is never missed for its key.
    room = min((limit - group_load[group]) / rates[d], WIDEST)
    key = min(capacity[d] - group_tokens[group], int(room) + 1)
    base = offsets[d]
    place = lower_bound(keys, base, base + count[d], key)
    for j in range(base + count[d], place, -1):
        keys[j] = keys[j - 1]
        ids[j] = ids[j - 1]
    keys[place] = key
    ids[place] = group
    count[d] += 1
    return group_load[group]


def next_fitting(rem: Any, q: int, num: int, tables: Any, space: Any) -> int:
    """First place from q on in rem whose sequence some group may hold."""
    lengths, degrees, offsets = tables[LENGTHS], tables[DEGREES], tables[OFFSETS]
    keys, count = space[KEYS], space[COUNT]
    most = 0
    for d in range(len(degrees)):
        if count[d] > 0:
            most = max(most, keys[offsets[d] + count[d] - 1])
    high = num
    while q < high:
        middle = (q + high) // 2
        if lengths[rem[middle]] > most:
            q = middle + 1
        else:
            high = middle
    return q


def choose(k: int, limit: float, free: int, groups: int, tables: Any, space: Any) -> int:
    """The group sequence k goes to: an old one, `groups` for a new one, or -1."""
    times, first, degrees = tables[TIMES], tables[FIRST], tables[DEGREES]
    count, group_degree, group_tokens, group_load = space[COUNT], space[GROUP_DEGREE], space[GROUP_TOKENS], space[GROUP_LOAD]
    wanted = first[k]
    # Memory allows degrees from first[k] on; of those, the first that is fast enough alone in its group.
    while wanted < len(degrees) and times[k * len(degrees) + wanted] > limit:
        wanted += 1
    for d in range(wanted, len(degrees)):
        group = take_best_fit(k, d, limit, tables, space) if count[d] > 0 and times[k * len(degrees) + d] <= limit else -1
        if group >= 0:
            return group
        # A new group only of the smallest degree: larger ones spend more rank-seconds, and are only filled up.
        if d == wanted and degrees[d] <= free:
            group_degree[groups], group_tokens[groups], group_load[groups] = d, 0, 0.0
            return groups
    return -1


def fill(rem: Any, num: int, tau: float, world: int, tables: Any, space: Any, left: Any, group_of: Any) -> tuple[int, int, float, int]:
    """Fill groups of together `world` ranks to at most `tau` seconds each, from the first `num` sequences of `rem`.

    Each goes to the smallest degree that holds it in memory and time: best fit among its groups, else a new group, else groups
    of larger degrees, else to `left`. group_of[place in rem] is the group or -1.
    Returns (sequences left, groups, largest load, sequences looked at).
    """
    degrees = tables[DEGREES]
    count, group_degree = space[COUNT], space[GROUP_DEGREE]
    for d in range(len(degrees)):
        count[d] = 0
    # tau is often the very time of one sequence; sums in another order must not push it over.
    limit, slowest = tau * (1.0 + 1e-12), 0.0
    free, groups, num_left, looked, q = world, 0, 0, 0, 0
    while q < num:
        k = rem[q]
        looked += 1
        group = choose(k, limit, free, groups, tables, space)
        group_of[q] = group
        q += 1
        if group >= 0:
            if group == groups:
                free -= degrees[group_degree[group]]
                groups += 1
            slowest = max(slowest, put(k, group, limit, tables, space))
            continue
        left[num_left] = k
        num_left += 1
        # Where no group can be added, whole runs of sequences are too long for every group there is.
        stop = next_fitting(rem, q, num, tables, space) if free < degrees[0] else q
        for j in range(q, stop):
            group_of[j] = -1
            left[num_left] = rem[j]
            num_left += 1
        q = stop
    return num_left, groups, slowest, looked


def greedy_choice(k: int, most: float, limit: float, free: int, groups: int, tables: Any, space: Any) -> int:
    """The group in which s^2 / ranks raises the largest work least; smaller degrees, then older groups win ties."""
    lengths, first, degrees, capacity = tables[LENGTHS], tables[FIRST], tables[DEGREES], tables[CAPACITY]
    group_degree, group_tokens, group_work = space[GROUP_DEGREE], space[GROUP_TOKENS], space[GROUP_LOAD]
    length = float(lengths[k])
    best, chosen, degree = limit, -1, -1
    for group in range(groups):
        d = group_degree[group]
        if d >= first[k] and group_tokens[group] + lengths[k] <= capacity[d]:
            work = max(most, group_work[group] + length * length / degrees[d])
            if work < best or (work == best and chosen >= 0 and d < degree):
                best, chosen, degree = work, group, d
    for d in range(first[k], len(degrees)):
        work = max(most, length * length / degrees[d])
        if degrees[d] <= free and (work < best or (work == best and chosen >= 0 and d < degree)):
            best, chosen, degree = work, groups, d
    if chosen == groups:
        group_degree[groups], group_tokens[groups], group_work[groups] = degree, 0, 0.0
    return chosen


def greedy_reach(limit: float, groups: int, tables: Any, space: Any) -> float:
    """The longest sequence some group can still take, by tokens and by work."""
    degrees, capacity = tables[DEGREES], tables[CAPACITY]
    group_degree, group_tokens, group_work = space[GROUP_DEGREE], space[GROUP_TOKENS], space[GROUP_LOAD]
    most = 0.0
    for group in range(groups):
        d = group_degree[group]
        room = float(capacity[d] - group_tokens[group])
        # One token more than the root: it may round down, and a sequence let through is judged again by greedy_choice.
        most = max(most, min(room, (max(0.0, limit - group_work[group]) * degrees[d]) ** 0.5 + 1.0))
    return most


def fill_greedy(
    rem: Any, num: int, tolerance: float, world: int, tables: Any, space: Any, left: Any, group_of: Any
) -> tuple[int, int, float, int]:
    """One micro-batch as Megatron's dynamic context parallelism makes it: longest first, counting s^2 / ranks only.

    The longest sequence gets the smallest group that holds it; no group's work may exceed its length x tokens a rank x `tolerance`.
    Returns as `fill`, with the largest work for the largest load.
    """
    lengths, first, degrees, capacity = tables[LENGTHS], tables[FIRST], tables[DEGREES], tables[CAPACITY]
    group_degree, group_tokens, group_work = space[GROUP_DEGREE], space[GROUP_TOKENS], space[GROUP_LOAD]
    limit = float(lengths[rem[0]]) * capacity[0] / degrees[0] * tolerance
    free, groups, num_left, looked, most = world, 0, 0, 0, 0.0
    q, reach = 0, float(lengths[rem[0]])
    while q < num:
        k = rem[q]
        if lengths[k] > reach:
            group_of[q] = -1
            left[num_left] = k
            num_left += 1
            q += 1
            continue
        looked += 1
        if q == 0:
            group = 0
            group_degree[0], group_tokens[0], group_work[0] = first[k], 0, 0.0
        else:
            group = greedy_choice(k, most, limit, free, groups, tables, space)
        group_of[q] = group
        q += 1
        if group < 0:
            left[num_left] = k
            num_left += 1
            if free < degrees[0]:
                reach = greedy_reach(limit, groups, tables, space)
            continue
        d = group_degree[group]
        if group == groups:
            free -= degrees[d]
            groups += 1
        group_tokens[group] += lengths[k]
        group_work[group] += float(lengths[k]) * lengths[k] / degrees[d]
        most = max(most, group_work[group])
    return num_left, groups, most, looked


FUNCTIONS = (lower_bound, take_best_fit, put, next_fitting, choose, fill, greedy_choice, greedy_reach, fill_greedy)
Kernel = Callable[[Any, int, float, int, Any, Any, Any, Any], tuple[int, int, float, int]]


@lru_cache(maxsize=1)
def compiled() -> tuple[Kernel, Kernel] | None:
    """(fill, fill_greedy) through numba, or None where it is not installed. Machine code is kept beside this file's byte code."""
    namespace = compile_functions(FUNCTIONS, globals())
    return None if namespace is None else (namespace["fill"], namespace["fill_greedy"])
