"""Layers to stages, against every other way to cut them."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest

from efflaunch.errors import ConfigError, PlanError
from efflaunch.parallel.pipeline.partition import GIB, StageLimits, balanced, given_partition, layer_seconds, least_share, partition
from efflaunch.parallel.pipeline.work import Batch, LayerLoad, ModelLoad, Recompute, unit_costs

LAYER = LayerLoad(token_s=1.0, kept_bytes=GIB, input_bytes=GIB / 8, fixed_bytes=GIB)
ROWS = {"tokens": 1.0, "pairs": 0.0}


def limited(tokens: float, in_flight: Sequence[int], caps: tuple[float, ...]) -> StageLimits:
    waiting = tuple(tokens * count for count in in_flight)
    return StageLimits(
        unit_tokens=tokens, waiting_tokens=waiting, held_tokens=waiting, deferred_tokens=(0.0,) * len(waiting), cap_bytes=caps
    )


def every_way(layers: int, stages: int) -> list[tuple[int, ...]]:
    return [tuple(b - a for a, b in zip((0, *cut), (*cut, layers), strict=True)) for cut in combinations(range(1, layers), stages - 1)]


def random_model(rng: random.Random) -> ModelLoad:
    def layer() -> LayerLoad:
        numbers = [rng.choice((0.5, 1.0, 3.0)) for _ in range(5)]
        return LayerLoad(
            token_s=numbers[0],
            pair_s=numbers[1],
            kept_bytes=numbers[2],
            attention_bytes=numbers[3] / 8,
            input_bytes=numbers[3] / 4,
            fixed_bytes=numbers[4],
        )

    return ModelLoad(layers=tuple(layer() for _ in range(rng.randint(1, 8))), embedding=layer(), head=layer())


def fastest(model: ModelLoad, counts: tuple[int, ...], rows: dict[str, float], ways: list[Recompute], limits: StageLimits | None) -> float:
    """Seconds of the slowest stage, each in its fastest way that fits, by the costs that schedules are simulated with."""
    batch = Batch.equal(1, int(rows["tokens"]))
    stages: list[list[float]] = [[] for _ in counts]
    for way in ways:
        table = unit_costs(model, batch, counts, batch.sizes(model, 1), (way,) * len(counts))
        for index, part in enumerate(model.on_stages(counts)):
            held, work = table.held_bytes[index, 0, 0], table.work_bytes[index, 0, 0]
            if (
                limits is None
                or table.fixed_bytes[index] + limits.held_tokens[index] / rows["tokens"] * held + work <= limits.cap_bytes[index]
            ):
                stages[index].append(sum(layer_seconds(one, rows["tokens"], rows["pairs"], way) for one in part))
    return max(min(seconds, default=math.inf) for seconds in stages)


def test_no_other_partition_that_fits_is_faster() -> None:
    rng = random.Random(2)
    fitted = refused = mixed = 0
    for _ in range(300):
        model = random_model(rng)
        stages = rng.randint(1, min(4, len(model.layers)))
        rows, ways = {"tokens": float(rng.randint(1, 3)), "pairs": rng.choice((0.0, 2.0))}, rng.sample(list(Recompute), rng.randint(1, 4))
        caps = tuple(rng.uniform(6, 40) for _ in range(stages))
        limits = limited(rows["tokens"], range(stages, 0, -1), caps)
        every = every_way(len(model.layers), stages)
        free = partition(model, stages, **rows, recompute=ways)
        assert free.slowest_s == pytest.approx(min(fastest(model, way, rows, ways, None) for way in every))
        best = min(fastest(model, way, rows, ways, limits) for way in every)
        if best == math.inf:
            with pytest.raises(PlanError, match="no partition fits"):
                partition(model, stages, **rows, recompute=ways, limits=limits)
            refused += 1
            continue
        found = partition(model, stages, **rows, recompute=ways, limits=limits)
        assert found.slowest_s == pytest.approx(best) == pytest.approx(fastest(model, found.counts, rows, ways, limits))
        table = unit_costs(model, Batch.equal(1, int(rows["tokens"])), found.counts, [[int(rows["tokens"])]], found.recompute)
        held = table.fixed_bytes + np.array(limits.held_tokens) / rows["tokens"] * table.held_bytes[:, 0, 0] + table.work_bytes[:, 0, 0]
        assert (held <= np.array(caps)).all()
        fitted, mixed = fitted + 1, mixed + (len(set(found.recompute)) > 1)
    assert fitted > 80 and refused > 50 and mixed > 5


def test_seconds_of_a_layer_are_those_of_its_units() -> None:
    model = ModelLoad(layers=(LayerLoad(token_s=2.0, pair_s=0.5),))
    batch = Batch.equal(1, 3)
    for recompute in Recompute:
        table = unit_costs(model, batch, (1,), batch.sizes(model, 1), (recompute,))
        whole = float((table.forward_s + table.backward_s + table.weight_s).sum())
        assert layer_seconds(model.layers[0], 3.0, 6.0, recompute) == pytest.approx(whole)


def test_a_heavy_head_takes_layers_off_the_last_stage() -> None:
    model = ModelLoad(layers=(LAYER,) * 8, head=LayerLoad(token_s=2.0))
    assert partition(model, 2, **ROWS).counts == (5, 3)
    assert partition(ModelLoad(layers=(LAYER,) * 8), 4, **ROWS).counts == (2, 2, 2, 2)
    # As fast, and more even than 3, 3, 1.
    assert partition(ModelLoad(layers=(LAYER,) * 7), 3, **ROWS).counts in ((2, 2, 3), (2, 3, 2), (3, 2, 2))


def test_memory_of_stages_that_hold_more_micro_batches_moves_layers() -> None:
    model = ModelLoad(layers=(LAYER,) * 8)
    caps = limited(1.0, (4, 1), (16 * GIB, 16 * GIB))
    assert partition(model, 2, **ROWS, limits=caps).counts == (3, 5)


def test_a_stage_that_does_not_fit_is_named_with_the_partition_that_would() -> None:
    model = ModelLoad(layers=(LAYER,) * 8)
    caps = limited(1.0, (4, 1), (16 * GIB, 16 * GIB))
    assert given_partition(model, [3, 5], 2, **ROWS, limits=caps).slowest_s == pytest.approx(15.0)
    with pytest.raises(PlanError) as error:
        given_partition(model, [4, 4], 2, **ROWS, limits=caps)
    assert "20.00 GiB on stage 0 (4 layers) of the partition that was given [4,4]" in str(error.value)
    assert "Try: [3,5], which fits" in str(error.value)


def test_where_none_fits_the_nearest_is_named() -> None:
    model = ModelLoad(layers=(LAYER,) * 8)
    caps = limited(1.0, (4, 1), (9 * GIB, 9 * GIB))
    for call in (lambda: partition(model, 2, **ROWS, limits=caps), lambda: given_partition(model, [2, 6], 2, **ROWS, limits=caps)):
        with pytest.raises(PlanError, match="no partition fits") as error:
            call()
        assert "stage 1 (6 layers)" in str(error.value) or "stage 0 (2 layers)" in str(error.value)


@pytest.mark.parametrize("counts", [[4, 5], [8], [0, 8], [9, -1], [3, 3, 2]])
def test_a_list_that_is_none_of_the_model_s_is_refused(counts: list[int]) -> None:
    with pytest.raises(ConfigError, match="2 numbers of 1 or more that add up to the model's 8 layers"):
        given_partition(ModelLoad(layers=(LAYER,) * 8), counts, 2, **ROWS)


@pytest.mark.parametrize("stages", [0, 9])
def test_more_stages_than_layers_are_refused(stages: int) -> None:
    with pytest.raises(ConfigError, match="expected 1 to 8"):
        partition(ModelLoad(layers=(LAYER,) * 8), stages, **ROWS)


@pytest.mark.parametrize("change", [{"cap_bytes": (1.0,)}, {"held_tokens": (1.0,)}, {"cap_bytes": (1.0, 0.0)}])
def test_limits_of_other_stages_are_refused(change: dict[str, tuple[float, ...]]) -> None:
    with pytest.raises(PlanError, match="one above 0 of each stage"):
        partition(ModelLoad(layers=(LAYER,) * 8), 2, **ROWS, limits=replace(limited(1.0, (1, 1), (1e12, 1e12)), **change))


def test_deferred_gradients_of_weights_hold_what_was_recomputed() -> None:
    model = ModelLoad(layers=(LAYER,) * 4)
    given = replace(limited(1.0, (4, 4), (12 * GIB,) * 2), deferred_tokens=(2.0, 0.0))
    # Two layers: 2 of weights, 4 x 2 / 8 of inputs, 1 of work; and 2 x 2 that wait for gradients of weights.
    found = partition(model, 2, **ROWS, recompute=(Recompute.LAYER,), limits=replace(given, cap_bytes=(8 * GIB, 4 * GIB)))
    assert found.counts == (2, 2)
    with pytest.raises(PlanError, match=r"7.99 GiB or less"):
        partition(model, 2, **ROWS, recompute=(Recompute.LAYER,), limits=replace(given, cap_bytes=(7.99 * GIB, 4 * GIB)))


def test_ranks_with_several_stages_become_even() -> None:
    model = ModelLoad(layers=(LAYER,) * 10, head=LayerLoad(token_s=1.0))
    owners = (0, 1, 2, 2, 1, 0)
    start = partition(model, 6, **ROWS)
    found = balanced(model, start, owners, **ROWS)

    def slowest_rank(counts: tuple[int, ...]) -> float:
        seconds = [sum(layer_seconds(one, 1.0, 0.0, Recompute.NONE) for one in part) for part in model.on_stages(counts)]
        return max(sum(s for s, owner in zip(seconds, owners, strict=True) if owner == rank) for rank in range(3))

    assert slowest_rank(found.counts) == pytest.approx(min(map(slowest_rank, every_way(10, 6))))
    assert slowest_rank(found.counts) <= slowest_rank(start.counts)
    assert balanced(model, found, owners, **ROWS) == found


def test_the_least_share_decides_whether_any_partition_fits() -> None:
    model = ModelLoad(layers=(LAYER,) * 8)
    for cap in (9.0, 11.9, 12.1, 30.0):
        limits = limited(1.0, (4, 1), (cap * GIB,) * 2)
        share = least_share(model, 2, **ROWS, recompute=(Recompute.NONE,), limits=limits)
        # Two layers hold 2 + 4 x 2, six hold 6 + 6; three would hold 15.
        assert share == pytest.approx(12 / cap)
        if share > 1:
            with pytest.raises(PlanError, match="no partition fits"):
                partition(model, 2, **ROWS, limits=limits)
        else:
            assert partition(model, 2, **ROWS, limits=limits).counts[0] >= 2
