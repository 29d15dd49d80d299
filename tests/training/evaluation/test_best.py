"""Which evaluation is the best, and when there were enough of them."""

from __future__ import annotations

import json
import math

import pytest

from efflaunch.training.evaluation.best import Best, load_best

LOSS, GAIN = "eval/web/loss", "eval/web/context_gain"


def follow(metric, values):
    best = Best(metric)
    for step, value in enumerate(values, 1):
        best = best.add(step, {metric: value})
    return best


@pytest.mark.parametrize(
    ("metric", "values", "step", "worse"),
    [
        (LOSS, [3.0, 2.0, 2.5], 2, 1),
        (LOSS, [3.0, 3.0, 3.0], 1, 2),
        (LOSS, [math.nan, 3.0, math.inf, None], 2, 2),
        (LOSS, [math.nan], None, 1),
        (GAIN, [0.1, 0.3, 0.2], 2, 1),
    ],
)
def test_best(metric, values, step, worse):
    best = follow(metric, values)
    assert (best.step, best.worse) == (step, worse)
    assert json.loads(json.dumps(best.dump())) == best.dump() and load_best(metric, best.dump()) == best


def test_patience():
    best = follow(LOSS, [2.0, 3.0, 3.0])
    assert best.ends(2) and best.ends(1) and not best.ends(3) and not best.ends(None)
    assert not best.add(4, {LOSS: 1.0}).ends(1)


def test_what_a_checkpoint_kept_of_another_metric_is_left():
    assert load_best(GAIN, follow(LOSS, [2.0]).dump()) == Best(GAIN)
    assert load_best(None, follow(LOSS, [2.0]).dump()) is None and load_best(LOSS, None) == Best(LOSS)
