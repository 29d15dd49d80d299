"""Cost models for tests, and the true optimum of tiny batches by trying everything."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np

from efflaunch.parallel.sequence.cost import CostModel, DegreeCost


def cost_of(
    world_size: int, tokens_per_rank: int = 1000, *, beta_s: float = 0.5, gather_s: float = 0.0, step_s: float = 0.0, slow: float = 0.3
) -> CostModel:
    """Quadratic and linear work shared by the ranks, and exchanges whose price grows with the group."""
    degrees = [1 << i for i in range(world_size.bit_length())]
    return CostModel(
        world_size=world_size,
        tokens_per_rank=tokens_per_rank,
        degrees=tuple(
            DegreeCost(degree=d, ulysses=d, attention_s=1e-6 / d, linear_s=1e-3 / d, exchange_s=slow * 1e-3 * (d - 1) / d) for d in degrees
        ),
        beta_s=beta_s,
        gather_s=gather_s,
        step_s=step_s,
    )


class FixedStart(DegreeCost):
    """A cost that falls per token as sequences grow: every sequence also takes a fixed time."""

    def sequence_s(self, lengths: Any) -> np.ndarray:
        return DegreeCost.sequence_s(self, lengths) + 0.4


def random_cost(generator: np.random.Generator, *, monotone: bool) -> CostModel:
    """Three or four ranks; not monotone: any positive coefficients, so wide groups may do less work, and fixed times."""
    world = int(generator.integers(1, 6))
    degrees = [1 << i for i in range(world.bit_length())]
    parts = []
    for d in degrees:
        share = d if monotone else float(generator.uniform(0.5, 6))
        kind = DegreeCost if monotone or generator.random() < 0.5 else FixedStart
        parts.append(
            kind(
                degree=d,
                ulysses=1,
                attention_s=1e-6 / share,
                linear_s=1e-3 / share,
                exchange_s=float(generator.choice([0.0, 3e-4])) * (degrees.index(d) if monotone else generator.random()) / share,
                ring_s=0.0 if monotone else float(generator.choice([0.0, 2e-3])),
                windowed_s=() if monotone or generator.random() < 0.5 else ((300, 1e-6),),
            )
        )
    return CostModel(
        world_size=world,
        tokens_per_rank=int(generator.integers(600, 2000)),
        degrees=tuple(parts),
        beta_s=float(generator.choice([0.0, 0.2, 1.5])),
        gather_s=float(generator.choice([0.0, 0.0, 0.8])),
        step_s=float(generator.choice([0.0, 0.3])),
    )


def random_lengths(generator: np.random.Generator, cost: CostModel, most: int = 6) -> list[int]:
    size = int(generator.integers(1, most + 1))
    drawn = generator.lognormal(np.log(generator.choice([150, 500, 1200])), 0.9, size).astype(np.int64)
    return np.clip(drawn, 1, cost.max_seq_len).tolist()


def optimum(lengths: list[int], cost: CostModel) -> float:
    """The fastest plan's seconds, over all ways to share sequences out to groups and groups to micro-batches."""
    everything = (1 << len(lengths)) - 1
    held = [[i for i in range(len(lengths)) if subset >> i & 1] for subset in range(everything + 1)]

    def group_s(subset: int, degree: int) -> float:
        mine = [lengths[i] for i in held[subset]]
        return cost.group_s(mine, degree) if sum(mine) <= degree * cost.tokens_per_rank else float("inf")

    @cache
    def side_by_side(subset: int, ranks: int) -> float:
        if not subset:
            return 0.0
        return min(
            (
                max(group_s(part, degree.degree), side_by_side(subset ^ part, ranks - degree.degree))
                for part in parts(subset)
                for degree in cost.degrees
                if degree.degree <= ranks
            ),
            default=float("inf"),
        )

    @cache
    def in_turn(subset: int) -> float:
        if not subset:
            return 0.0
        return min(cost.beta_s + max(cost.gather_s, side_by_side(part, cost.world_size)) + in_turn(subset ^ part) for part in parts(subset))

    return cost.step_s + in_turn(everything)


def parts(subset: int) -> list[int]:
    """The subsets that hold the lowest element."""
    low, subsets = subset & -subset, []
    rest = subset ^ low
    part = rest
    while True:
        subsets.append(part | low)
        if not part:
            return subsets
        part = (part - 1) & rest
