"""What the planner knows of one batch, in flat tables sorted by length, and how a finished packing becomes a StepPlan."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .cost import CostModel, check_lengths
from .fill import Kernel, compiled, fill, fill_greedy
from .plan import Group, MicroBatch, StepPlan

COMPILED_FROM = 192
"""Sequences of a batch from which loading numba pays."""


@dataclass(frozen=True, slots=True)
class Shelf:
    """One micro-batch: places in the sorted order, their groups, and the degree index of each group."""

    members: np.ndarray
    groups: np.ndarray
    degrees: tuple[int, ...]
    load_s: float
    """Seconds of the slowest group."""


class Batch:
    """Lengths in descending order with the seconds of each under each degree, and scratch for the inner loops."""

    def __init__(self, lengths: Sequence[int], cost: CostModel, *, use_compiled: bool | None = None) -> None:
        """PlanError for a length that no group can hold. `use_compiled`: None for what suits the size."""
        given = np.asarray(lengths, dtype=np.int64)
        if given.size and (given.min() < 1 or given.max() > cost.max_seq_len):
            check_lengths(given.tolist(), cost)
        self.cost, self.given = cost, given
        self.order = np.argsort(-given, kind="stable")
        self.lengths = given[self.order]
        self.degrees = np.array([degree.degree for degree in cost.degrees], dtype=np.int64)
        self.capacity = self.degrees * cost.tokens_per_rank
        self.times = np.stack([cost.sequence_s(self.lengths, int(degree)) for degree in self.degrees], axis=1)
        self.first = np.searchsorted(self.capacity, self.lengths).astype(np.int64)
        fits = np.arange(len(self.degrees)) >= self.first[:, None]
        self.fastest = np.where(fits, self.times, np.inf).min(axis=1, initial=np.inf)
        self.work = np.where(fits, self.times * self.degrees, np.inf).min(axis=1, initial=np.inf)
        """Least rank-seconds of each sequence."""
        kernels = compiled() if (use_compiled if use_compiled is not None else len(given) >= COMPILED_FROM) else None
        self._prepare(kernels)

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def num_shelves(self) -> int:
        """Micro-batches that memory alone asks for."""
        return int(-(-int(self.lengths.sum()) // (self.cost.world_size * self.cost.tokens_per_rank)))

    def _prepare(self, kernels: tuple[Kernel, Kernel] | None) -> None:
        world, size = self.cost.world_size, len(self)
        per_degree = world // self.degrees
        offsets = np.concatenate([[0], np.cumsum(per_degree)]).astype(np.int64)
        rates = np.maximum((self.times / np.maximum(self.lengths, 1)[:, None]).min(axis=0, initial=np.inf), 1e-300)
        tables = (self.lengths, self.times.ravel(), self.first, self.degrees, self.capacity, rates, offsets[:-1].copy())
        whole, real = (np.int64, np.float64)
        space = (
            np.zeros(offsets[-1], whole),
            np.zeros(offsets[-1], whole),
            np.zeros(len(self.degrees), whole),
            np.zeros(world + 1, whole),
            np.zeros(world + 1, whole),
            np.zeros(world + 1, real),
        )
        self.is_compiled = kernels is not None
        self.fill, self.fill_greedy = kernels or (fill, fill_greedy)
        self.tables: Any = tables if self.is_compiled else tuple(table.tolist() for table in tables)
        self.space: Any = space if self.is_compiled else tuple(table.tolist() for table in space)
        self.left: Any = np.zeros(size, whole) if self.is_compiled else [0] * size
        self.group_of: Any = np.zeros(size, whole) if self.is_compiled else [0] * size
        self.looked = 0

    def everything(self) -> Any:
        """All places, as the inner loops want them."""
        return np.arange(len(self), dtype=np.int64) if self.is_compiled else list(range(len(self)))

    def run(self, kernel: Kernel, rem: Any, value: float) -> tuple[Any, float, int]:
        """One micro-batch from `rem`: (places left, largest load, groups); group_of says where the others went."""
        num_left, groups, slowest, looked = kernel(
            rem, len(rem), value, self.cost.world_size, self.tables, self.space, self.left, self.group_of
        )
        self.looked += looked
        return self.left[:num_left].copy(), slowest, groups

    def shelf(self, rem: Any, groups: int, load_s: float) -> Shelf:
        """What the last `run` packed."""
        group_of = np.asarray(self.group_of[: len(rem)], dtype=np.int64)
        taken = group_of >= 0
        return Shelf(np.asarray(rem, dtype=np.int64)[taken], group_of[taken], tuple(int(d) for d in self.space[3][:groups]), load_s)

    def shelf_s(self, load_s: float) -> float:
        """Seconds of a micro-batch whose slowest group takes load_s."""
        return self.cost.beta_s + max(self.cost.gather_s, load_s)

    def seconds(self, shelves: Sequence[Shelf]) -> float:
        return self.cost.step_s + sum(self.shelf_s(shelf.load_s) for shelf in shelves)

    def plan(self, shelves: Sequence[Shelf], source: str) -> StepPlan:
        """Groups of each micro-batch laid over the ranks, largest first: so every block is aligned whatever the world size."""
        batches = tuple(self._micro_batch(shelf) for shelf in shelves if len(shelf.members))
        lengths = tuple(self.given.tolist())
        return StepPlan(self.cost.world_size, lengths, batches, predicted_s=self.seconds(shelves), source=source)

    def _micro_batch(self, shelf: Shelf) -> MicroBatch:
        by_group = np.argsort(shelf.groups, kind="stable")
        cuts = np.searchsorted(shelf.groups[by_group], np.arange(1, len(shelf.degrees)))
        members = [np.sort(self.order[part]) for part in np.split(shelf.members[by_group], cuts)]
        loads = np.bincount(shelf.groups, self.times[shelf.members, np.asarray(shelf.degrees)[shelf.groups]], len(shelf.degrees))
        groups, rank = [], 0
        for g in sorted(range(len(members)), key=lambda g: (-shelf.degrees[g], -loads[g], members[g][0])):
            cost = self.cost.degrees[shelf.degrees[g]]
            groups.append(Group(rank, cost.degree, cost.ulysses, tuple(members[g].tolist()), predicted_s=float(loads[g])))
            rank += cost.degree
        return MicroBatch(tuple(groups))
