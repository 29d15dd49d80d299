"""What an evaluation is called in metrics, sinks and train.keep_best."""

from __future__ import annotations

import json

import numpy as np
import pytest

from efflaunch.launcher.rundir.metrics_events import is_sound
from efflaunch.training.evaluation.config import EvalConfig, metric_names
from efflaunch.training.evaluation.results import CorpusResult
from efflaunch.training.evaluation.tally import Tally


def tally(losses, positions, border=None):
    made = Tally(border)
    made.add(-np.array(losses, dtype=np.float64), np.array(positions), np.ones(len(losses), dtype=bool))
    return made


def result(short=True, losses=(1.0, 2.0, 3.0)):
    return CorpusResult(
        corpus="web",
        whole=tally(losses, (0, 1, 5), border=4),
        short=tally([4.5], [3]) if short else None,
        lengths={1 << 20: tally([2.0], [7]), 8192: tally([2.5], [7])},
        context_tokens=4,
        tokens=99,
    )


def test_metrics_have_the_names_that_keep_best_is_checked_against():
    metrics = result().metrics()
    config = EvalConfig(name="t", corpora={"web": "p"}, lengths=[1 << 20, 8192], context_tokens=4)
    assert [name for name in metrics if "position" not in name] == metric_names(config, 1 << 20)
    assert metrics == {
        "eval/web/loss": 2.0,
        "eval/web/loss_8K": 2.5,
        "eval/web/loss_1M": 2.0,
        "eval/web/context_gain": 1.5,
        "eval/web/position_1": 1.0,
        "eval/web/position_2": 2.0,
        "eval/web/position_8": 3.0,
    }


def test_the_event_is_a_sound_line():
    fields = result().fields()
    assert fields["context"] == {"tokens": 4, "targets": 1, "loss": 3.0, "short_loss": 4.5, "gain": 1.5}
    assert [entry["length"] for entry in fields["lengths"]] == [8192, 1 << 20]
    event = json.loads(json.dumps({"event": "eval", "time": 1.0, "step": 3, "eval_s": 0.5, **fields}))
    assert is_sound(event)
    assert is_sound(event | {"metrics": {"eval/web/loss": None}})
    for damage in (
        {"targets": -1},
        {"metrics": {"a": "x"}},
        {"lengths": [{"loss": 1.0}]},
        {"positions": [{"up_to": 1, "targets": 1, "loss": []}]},
    ):
        assert not is_sound(event | damage), damage


def test_without_a_short_pass_there_is_no_gain():
    fields = result(short=False).fields()
    assert fields["context"] is None and "eval/web/context_gain" not in fields["metrics"]


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_losses_that_are_none_stay_so(value):
    assert not np.isfinite(result(losses=(value, 1.0, 1.0)).metrics()["eval/web/loss"])
