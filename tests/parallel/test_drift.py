"""The drift of a cost model: noticed, told once, followed slowly, and kept through checkpoints."""

from __future__ import annotations

import json

import numpy as np
import pytest

from efflaunch.parallel.sequence.cost import CostModel, DegreeCost
from efflaunch.parallel.sequence.drift import ENOUGH, Drift

COST = CostModel(
    world_size=2,
    tokens_per_rank=4096,
    degrees=tuple(DegreeCost(degree=d, ulysses=1, attention_s=2e-9 / d, linear_s=4e-6 / d, exchange_s=1e-6 * (d > 1)) for d in (1, 2)),
)


def fed(attention, linear, groups=400, noise=0.0):
    """A machine whose degree 2 takes `attention` and `linear` times what the model says; degree 1 is as modelled."""
    drift, generator = Drift(COST), np.random.default_rng(5)
    cost = COST.of(2)
    for _ in range(groups):
        n = int(generator.integers(50, 8000))
        true_s = attention * cost.attention_s * n * n + linear * (cost.linear_s + cost.exchange_s) * n
        drift.add([n], 2, true_s * float(np.exp(generator.normal(0, noise))))
        drift.add([n], 1, COST.group_s([n], 1))
    return drift


def test_a_model_that_is_right_stays_as_it_is():
    drift = fed(1.0, 1.0)
    assert drift.news() == {} and drift.by_degree[2].ratio == pytest.approx(1.0)
    assert drift.refitted().of(2).attention_s == pytest.approx(COST.of(2).attention_s, rel=1e-9)


def test_drift_is_reported_once_and_again_after_it_was_gone():
    drift = fed(2.0, 2.0)
    assert drift.news() == {2: pytest.approx(2.0, rel=1e-6)}
    assert drift.news() == {}
    for _ in range(3000):
        drift.add([100], 2, COST.group_s([100], 2))
    assert drift.news() == {}
    for _ in range(3000):
        drift.add([100], 2, 3 * COST.group_s([100], 2))
    assert list(drift.news()) == [2]


def test_few_groups_say_nothing():
    assert fed(3.0, 3.0, groups=ENOUGH - 1).news() == {}


def test_the_refit_tells_attention_from_linear_work():
    refitted = fed(2.0, 0.5, noise=0.02).refitted()
    assert refitted.of(2).attention_s == pytest.approx(2.0 * COST.of(2).attention_s, rel=0.1)
    assert refitted.of(2).linear_s == pytest.approx(0.5 * COST.of(2).linear_s, rel=0.1)
    assert refitted.of(1).linear_s == pytest.approx(COST.of(1).linear_s, rel=1e-9)


def test_one_odd_group_moves_little():
    drift = Drift(COST)
    drift.add([1000], 2, 500 * COST.group_s([1000], 2))
    assert 1 < drift.refitted().of(2).linear_s / COST.of(2).linear_s < 1.2


def test_it_resumes_after_a_restart_bit_by_bit():
    whole, first = fed(1.7, 1.2, groups=60), fed(1.7, 1.2, groups=40)
    second = Drift(COST)
    second.load(json.loads(json.dumps(first.dump())))
    assert second.dump() == first.dump() and second.refitted() == first.refitted()
    assert whole.dump() != first.dump()
