"""Which layers go to which stage: contiguous, the slowest stage as fast as memory allows. Pure, and exact: dynamic programming.

A stage's time is its layers' forward and backward time for the mean micro-batch, embedding and head included. What a stage holds is
its fixed bytes and what its units in flight keep.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import NoReturn

import numpy as np

from ...errors import ConfigError, PlanError
from .simulate import Floats
from .work import PAIR_BACKWARD, LayerLoad, ModelLoad, Recompute

GIB = 1 << 30


@dataclass(frozen=True, kw_only=True, slots=True)
class StageLimits:
    """What a stage may hold, and of how many tokens. A value for each stage but for the first."""

    unit_tokens: float
    """Of the largest micro-batch, or slice of it: what one unit works on."""
    waiting_tokens: tuple[float, ...]
    """Most at one time between forward and the end of backward, gradients of weights counted."""
    held_tokens: tuple[float, ...]
    """Most between forward and gradients of inputs."""
    deferred_tokens: tuple[float, ...]
    """Most between gradients of inputs and those of weights, where they are units of their own."""
    cap_bytes: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Partition:
    """Layers of each stage, in order, and what it recomputes."""

    counts: tuple[int, ...]
    recompute: tuple[Recompute, ...]
    slowest_s: float
    """Forward and backward of the slowest stage, for one micro-batch."""

    def __str__(self) -> str:
        return ",".join(map(str, self.counts))


def layer_seconds(layer: LayerLoad, tokens: float, pairs: float, recompute: Recompute) -> float:
    """Forward and backward of one layer for one micro-batch."""
    token_passes, pair_passes = 3 + recompute.tokens_again, 1 + PAIR_BACKWARD + recompute.pairs_again
    return token_passes * layer.token_s * tokens + pair_passes * layer.pair_s * pairs


def partition(
    model: ModelLoad,
    stages: int,
    *,
    tokens: float,
    pairs: float,
    recompute: Sequence[Recompute] = (Recompute.NONE,),
    limits: StageLimits | None = None,
) -> Partition:
    """The partition into `stages` whose slowest stage is fastest; among those the one with the least sum of squares.

    `tokens` and `pairs` are the mean micro-batch's. Each stage takes the fastest way of `recompute` that keeps it within `limits`.
    PlanError where no partition does: it names the stage that is furthest above its cap in the partition that comes nearest.
    """
    _check_stages(model, stages)
    seconds, share = _tables(model, stages, tokens, pairs, recompute, limits)
    slowest, _ = _best(seconds, np.maximum)
    if not np.isfinite(slowest):
        _, nearest = _best(share, np.maximum)
        _refuse_memory(
            nearest, share, limits, "the nearest partition", "smaller micro-batches, more slices or recomputation; no partition fits"
        )
    # Among the fastest, even ones have shorter bubbles.
    _, counts = _best([np.where(table <= slowest * (1 + 1e-12), table**2, np.inf) for table in seconds], np.add)
    return _partition(model, counts, tokens, pairs, recompute, limits)


def balanced(
    model: ModelLoad,
    start: Partition,
    stage_ranks: Sequence[int],
    *,
    tokens: float,
    pairs: float,
    recompute: Sequence[Recompute] = (Recompute.NONE,),
    limits: StageLimits | None = None,
) -> Partition:
    """A partition for ranks with several stages: layers move from the slowest rank's to other stages while the slowest becomes faster.

    Each move keeps the stages between as they are but for their place. A local search: not exact, and never slower than `start`.
    """
    tables = [table.tolist() for table in _tables(model, len(stage_ranks), tokens, pairs, recompute, limits)[0]]

    def rank_s(counts: Sequence[int]) -> list[float]:
        total, first = [0.0] * (max(stage_ranks) + 1), 0
        for stage, count in enumerate(counts):
            total[stage_ranks[stage]] += tables[stage][first][first + count]
            first += count
        return total

    def key(counts: Sequence[int]) -> tuple[float, float]:
        seconds = rank_s(counts)
        return max(seconds), sum(value**2 for value in seconds)

    counts = list(start.counts)
    best = key(counts)
    while True:
        seconds = rank_s(counts)
        slowest = seconds.index(max(seconds))
        ways = []
        for source in (stage for stage, rank in enumerate(stage_ranks) if rank == slowest and counts[stage] > 1):
            for target in (stage for stage, rank in enumerate(stage_ranks) if rank != slowest):
                way = list(counts)
                way[source], way[target] = way[source] - 1, way[target] + 1
                ways.append((key(way), way))
        # Differences in the last digits are no gain.
        if not ways or min(ways)[0][0] > best[0] * (1 + 1e-9) or min(ways)[0][1] > best[1] * (1 - 1e-9):
            return _partition(model, counts, tokens, pairs, recompute, limits)
        best, counts = min(ways)


def _partition(
    model: ModelLoad, counts: Sequence[int], tokens: float, pairs: float, recompute: Sequence[Recompute], limits: StageLimits | None
) -> Partition:
    """What was chosen: the same tables, each way by itself, say which way each stage takes."""
    bounds, found = [0, *accumulate(counts)], []
    tables = [(way, _tables(model, len(counts), tokens, pairs, (way,), limits)[0]) for way in recompute]
    for stage, (start, stop) in enumerate(pairwise(bounds)):
        found.append(min(((float(seconds[stage][start, stop]), way) for way, seconds in tables), key=lambda pair: pair[0]))
    return Partition(tuple(counts), tuple(way for _, way in found), max(seconds for seconds, _ in found))


def given_partition(
    model: ModelLoad,
    counts: Sequence[int],
    stages: int,
    *,
    tokens: float,
    pairs: float,
    recompute: Sequence[Recompute] = (Recompute.NONE,),
    limits: StageLimits | None = None,
) -> Partition:
    """A partition that a person chose. ConfigError for a list that is none of the model's, PlanError for a stage that does not fit.

    The PlanError names the stage and the partition that fits, where there is one.
    """
    _check_stages(model, stages)
    if len(counts) != stages or sum(counts) != len(model.layers) or min(counts) < 1:
        even = partition(model, stages, tokens=tokens, pairs=pairs, recompute=recompute)
        expected = f"{stages} numbers of 1 or more that add up to the model's {len(model.layers)} layers"
        raise ConfigError("layers of pipeline stages", found=str(list(counts)), expected=expected, hint=f"[{even}]")
    _, share = _tables(model, stages, tokens, pairs, recompute, limits)
    if any(table[start, stop] > 1.0 for table, (start, stop) in zip(share, pairwise([0, *accumulate(counts)]), strict=True)):
        try:
            hint = f"[{partition(model, stages, tokens=tokens, pairs=pairs, recompute=recompute, limits=limits)}], which fits"
        except PlanError as error:
            hint = error.hint
        _refuse_memory(tuple(counts), share, limits, "the partition that was given", hint)
    return _partition(model, counts, tokens, pairs, recompute, limits)


def least_share(
    model: ModelLoad, stages: int, *, tokens: float, pairs: float, recompute: Sequence[Recompute], limits: StageLimits | None
) -> float:
    """Of its cap, what the fullest stage holds in the partition that comes nearest: above 1 none fits."""
    _, share = _tables(model, stages, tokens, pairs, recompute, limits)
    return _best(share, np.maximum)[0]


def _check_stages(model: ModelLoad, stages: int) -> None:
    if not 1 <= stages <= len(model.layers):
        expected = f"1 to {len(model.layers)}, the model's layers"
        raise ConfigError("pipeline stages", found=str(stages), expected=expected, hint=f"{max(1, min(stages, len(model.layers)))} stages")


# Tables have a row for each first layer and a column for the layer behind the last: what a stage of them costs. The first stage, which
# alone begins with layer 0, has the embedding, the last one the head. Stages without a layer are infinite.


def _with_ends(model: ModelLoad) -> tuple[list[LayerLoad], list[int], list[int]]:
    """Layers with both ends, and among them: where a stage starts whose first layer is each, and where one stops whose last layer is."""
    count = len(model.layers)
    return [model.embedding, *model.layers, model.head], [0, *range(2, count + 1), count + 1], [*range(2, count + 1), count + 2]


def _sums(values: Sequence[float], starts: Sequence[int], stops: Sequence[int]) -> Floats:
    before = np.array([0.0, *accumulate(values)])
    table = np.full((len(starts), len(starts)), np.inf)
    table[:-1, 1:] = before[stops][None, :] - before[starts[:-1]][:, None]
    return _of_layers(table)


def _of_layers(table: Floats) -> Floats:
    """The table, infinite where a stage would have no layer."""
    return np.where(np.arange(len(table))[:, None] < np.arange(len(table))[None, :], table, np.inf)


def _tables(
    model: ModelLoad, stages: int, tokens: float, pairs: float, recompute: Sequence[Recompute], limits: StageLimits | None
) -> tuple[list[Floats], list[Floats]]:
    """By stage: seconds of the fastest way that fits, infinite where none does; and the least share of its cap."""
    layers, starts, stops = _with_ends(model)
    seconds = {way: _sums([layer_seconds(one, tokens, pairs, way) for one in layers], starts, stops) for way in recompute}
    if limits is None:
        return [np.minimum.reduce(list(seconds.values()))] * stages, [_of_layers(np.zeros_like(seconds[recompute[0]]))] * stages
    columns = limits.waiting_tokens, limits.held_tokens, limits.deferred_tokens, limits.cap_bytes
    if any(len(column) != stages for column in columns) or min(limits.cap_bytes) <= 0:
        found = f"{len(limits.cap_bytes)} caps for {stages} stages, the smallest {min(limits.cap_bytes, default=0.0):g}"
        raise PlanError("pipeline partition", found=found, expected="one above 0 of each stage", hint="a cap for each stage")
    fixed = _sums([one.fixed_bytes for one in layers], starts, stops)
    kept, _ = _activations(layers, starts, stops, Recompute.NONE)
    tables = {way: _activations(layers, starts, stops, way) for way in recompute}
    fastest, least = [], []
    for waiting, held, deferred, cap in zip(*columns, strict=True):
        shares = {}
        for way, (own, work) in tables.items():
            # Gradients of weights need what was kept or recomputed.
            waits = ((waiting, kept),) if way is Recompute.NONE else ((held, own), (deferred, kept))
            shares[way] = (fixed + sum(tokens * table for tokens, table in waits if tokens) + limits.unit_tokens * work) / cap
        fastest.append(np.minimum.reduce([np.where(shares[way] <= 1.0, seconds[way], np.inf) for way in recompute]))
        least.append(np.minimum.reduce(list(shares.values())))
    return fastest, least


def _activations(layers: Sequence[LayerLoad], starts: Sequence[int], stops: Sequence[int], way: Recompute) -> tuple[Floats, Floats]:
    """Tables of `activation_bytes`."""
    kept, inputs = [one.kept_bytes for one in layers], [one.input_bytes for one in layers]
    sums = _sums(kept, starts, stops)
    if way is Recompute.NONE:
        return sums, _of_layers(np.zeros_like(sums))
    if way is Recompute.STAGE:
        # The embedding has no input of its own: what waits is its output.
        first = np.array([next((size for size in inputs[start:] if size), 0.0) for start in starts])
        return _of_layers(np.broadcast_to(first[:, None], sums.shape)), sums
    largest = np.full_like(sums, np.inf)
    for row, start in enumerate(starts[:-1]):
        largest[row, 1:] = np.maximum.accumulate(kept[start:])[np.maximum(np.array(stops) - 1 - start, 0)]
    waits = inputs if way is Recompute.LAYER else [one.input_bytes + one.attention_bytes for one in layers]
    return _sums(waits, starts, stops), _of_layers(largest)


def _best(tables: Sequence[Floats], combine: Callable[[Floats, Floats], Floats]) -> tuple[float, tuple[int, ...]]:
    """The least combination of one stage after the other over all layers, and the stages' layers."""
    best, chosen = tables[0][0], []
    for table in tables[1:]:
        ways = combine(np.broadcast_to(best[:, None], table.shape), table)
        chosen.append(ways.argmin(axis=0))
        best = ways.min(axis=0)
    stop, counts = len(best) - 1, []
    for starts in reversed(chosen):
        counts.append(stop - int(starts[stop]))
        stop = int(starts[stop])
    return float(best[-1]), (stop, *reversed(counts))


def _refuse_memory(counts: tuple[int, ...], share: Sequence[Floats], limits: StageLimits | None, which: str, hint: str) -> NoReturn:
    assert limits is not None
    bounds = [0, *accumulate(counts)]
    shares = [float(table[start, stop]) for table, start, stop in zip(share, bounds, bounds[1:], strict=False)]
    stage = max(range(len(shares)), key=shares.__getitem__)
    cap = limits.cap_bytes[stage]
    found = f"{shares[stage] * cap / GIB:.2f} GiB on stage {stage} ({counts[stage]} layers) of {which} [{','.join(map(str, counts))}]"
    raise PlanError("pipeline partition", found=found, expected=f"{cap / GIB:.2f} GiB or less", hint=hint)
