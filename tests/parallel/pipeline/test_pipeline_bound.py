"""The lower bound of a step holds for every candidate, and is met where nothing stands in the way."""

from __future__ import annotations

import random

import pytest

from efflaunch.parallel.pipeline.pipeline_bound import lower_bound_s
from efflaunch.parallel.pipeline.solve import candidates, try_candidate
from efflaunch.parallel.pipeline.work import Batch, LayerLoad, ModelLoad
from efflaunch.tests.parallel.pipeline.random_problems import random_problem


def bound_of(model: ModelLoad, batch: Batch, ranks: int, slices: tuple[int, ...]) -> float:
    return lower_bound_s(model, batch, ranks, [batch.sizes(model, count) for count in slices])


def test_no_candidate_is_faster() -> None:
    rng = random.Random(4)
    ratios = []
    for _ in range(60):
        problem = random_problem(rng)
        bound = bound_of(problem.model, problem.batch, problem.ranks, problem.slices)
        for candidate in candidates(problem):
            trial = try_candidate(problem, candidate)
            assert trial.timeline is not None
            ratios.append(trial.timeline.step_s / bound)
    assert min(ratios) >= 1 - 1e-9 and min(ratios) < 1.05 and len(ratios) > 300


def test_one_rank_has_no_bubble() -> None:
    model = ModelLoad(layers=(LayerLoad(token_s=1.0, pair_s=2.0),) * 2)
    # Three passes over 2 tokens and 3.5 over 3 pairs, of 2 layers and 3 micro-batches.
    assert bound_of(model, Batch.equal(3, 2), 1, (1,)) == pytest.approx(2 * 3 * (3 * 2 + 3.5 * 2 * 3))


def test_one_micro_batch_goes_all_the_way() -> None:
    model = ModelLoad(layers=(LayerLoad(token_s=1.0),) * 8)
    assert bound_of(model, Batch.equal(1, 8), 8, (1,)) == pytest.approx(8 * 8 * 2)
    # With slices it may overlap: 8 layers x 8 tokens x 3 passes on 8 ranks, and what they wait for 4 tokens of up to 7 layers.
    assert bound_of(model, Batch.equal(1, 8), 8, (1, 2)) == pytest.approx(max(24 + 4 * 2 * 28 / 8, 8 * 4 * 2))
