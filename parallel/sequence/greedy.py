"""Plans made without search: what others do, and what an adaptive plan is never worse than."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator
from heapq import heapify, heappop, heappush

import numpy as np

from .tables import Batch, Shelf

TOLERANCE = 1.05
"""How far a group's s^2 / ranks may exceed what fills the longest sequence's group with sequences as long."""


def greedy_shelves(batch: Batch) -> list[Shelf]:
    """Longest first as in Megatron's dynamic context parallelism (s^2 / ranks is all it counts); idle ranks then widen slow groups."""
    rem, shelves = batch.everything(), []
    while len(rem):
        left, _, groups = batch.run(batch.fill_greedy, rem, TOLERANCE)
        shelves.append(widened(batch, batch.shelf(rem, groups, 0.0)))
        rem = left
    return shelves


def widened(batch: Batch, shelf: Shelf) -> Shelf:
    """Double the slowest group as long as idle ranks allow it and it gets faster."""
    size = len(shelf.degrees)
    loads = np.stack([np.bincount(shelf.groups, batch.times[shelf.members, d], size) for d in range(len(batch.degrees))])
    degrees = np.array(shelf.degrees, dtype=np.int64)
    free = batch.cost.world_size - int(batch.degrees[degrees].sum())
    now = loads[degrees, np.arange(size)]
    while True:
        slowest = int(now.argmax())
        wider = int(degrees[slowest]) + 1
        if wider == len(batch.degrees):
            break
        more = int(batch.degrees[wider] - batch.degrees[degrees[slowest]])
        if more > free or loads[wider, slowest] >= now[slowest]:
            break
        degrees[slowest], now[slowest], free = wider, loads[wider, slowest], free - more
    return Shelf(shelf.members, shelf.groups, tuple(degrees.tolist()), float(now.max()))


def static_shelves(batch: Batch) -> Iterator[list[Shelf]]:
    """Shelves for every degree that holds the longest sequence: best-fit packs of like load together, and balanced packs."""
    for d in range(int(batch.first[0]), len(batch.degrees)):
        yield from (_row(batch, packs, d) for packs in (best_fit(batch, d), balanced(batch, d)))


def best_fit(batch: Batch, d: int) -> list[list[int]]:
    """Fewest packs of one degree: longest first, each into the fullest pack that holds it."""
    capacity = int(batch.capacity[d])
    packs: list[list[int]] = []
    rooms: list[tuple[int, int]] = []
    for k, length in enumerate(batch.lengths.tolist()):
        place = bisect_left(rooms, (length, -1))
        if place < len(rooms):
            room, pack = rooms.pop(place)
        else:
            room, pack = capacity, len(packs)
            packs.append([])
        packs[pack].append(k)
        insort(rooms, (room - length, pack))
    return packs


def balanced(batch: Batch, d: int) -> list[list[int]]:
    """Packs of one degree with like load: longest first onto the least loaded; a micro-batch more until all fit."""
    per_shelf = batch.cost.world_size // int(batch.degrees[d])
    shelves = max(1, -(-int(batch.lengths.sum()) // (int(batch.capacity[d]) * per_shelf)))
    while True:
        packs = _least_loaded(batch, d, shelves * per_shelf)
        if packs is not None:
            return [pack for pack in packs if pack]
        shelves += max(1, shelves // 32)


def _least_loaded(batch: Batch, d: int, opened: int) -> list[list[int]] | None:
    packs: list[list[int]] = [[] for _ in range(opened)]
    rooms = [int(batch.capacity[d])] * opened
    queue = [(0.0, pack) for pack in range(opened)]
    heapify(queue)
    loads = batch.times[:, d].tolist()
    waiting: list[tuple[int, float, int]] = []
    for k, length in enumerate(batch.lengths.tolist()):
        # Lengths only fall: a pack that is too full now waits until a sequence comes that it can take.
        while waiting and -waiting[0][0] >= length:
            _, load, pack = heappop(waiting)
            heappush(queue, (load, pack))
        while queue and rooms[queue[0][1]] < length:
            load, pack = heappop(queue)
            heappush(waiting, (-rooms[pack], load, pack))
        if not queue:
            return None
        load, pack = heappop(queue)
        packs[pack].append(k)
        rooms[pack] -= length
        heappush(queue, (load + loads[k], pack))
    return packs


def _row(batch: Batch, packs: list[list[int]], d: int) -> list[Shelf]:
    """Packs in descending load, as many side by side as there are ranks for."""
    loads = [float(batch.times[pack, d].sum()) for pack in packs]
    order = sorted(range(len(packs)), key=lambda pack: (-loads[pack], pack))
    per_shelf = batch.cost.world_size // int(batch.degrees[d])
    shelves = []
    for start in range(0, len(order), per_shelf):
        side = order[start : start + per_shelf]
        members = np.concatenate([np.asarray(packs[pack], dtype=np.int64) for pack in side])
        groups = np.repeat(np.arange(len(side)), [len(packs[pack]) for pack in side])
        shelves.append(Shelf(members, groups, (d,) * len(side), loads[side[0]]))
    return shelves
