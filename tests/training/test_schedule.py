"""Schedules against transformers' own, and every number that is refused."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from efflaunch.errors import ConfigError
from efflaunch.training.optimizers.config import OptimConfig
from efflaunch.training.optimizers.lr_schedule import check_optim, ends_at_zero, learning_rate, warmup_steps

BASE = OptimConfig(name="test", lr=3e-4)
STEPS = 40


def _rates(config: OptimConfig, steps: int = STEPS) -> list[float]:
    return [learning_rate(config, step, steps) for step in range(steps)]


def _reference(make: str, **arguments: float) -> list[float]:
    import transformers

    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=BASE.lr)
    scheduler = getattr(transformers, make)(optimizer, num_warmup_steps=0, **arguments)
    rates = []
    for _ in range(int(arguments["num_training_steps"])):
        rates.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    return rates


@pytest.mark.parametrize("warmup", [0, 7])
@pytest.mark.parametrize(
    ("schedule", "make"), [("cosine", "get_cosine_schedule_with_warmup"), ("linear", "get_linear_schedule_with_warmup")]
)
def test_after_warm_up_the_rates_are_those_of_transformers(schedule: str, make: str, warmup: int) -> None:
    rates = _rates(replace(BASE, schedule=schedule, warmup_steps=warmup))
    assert rates[warmup:] == pytest.approx(_reference(make, num_training_steps=STEPS - warmup), rel=1e-12)


def test_cosine_falls_to_the_given_share() -> None:
    config = replace(BASE, min_lr_ratio=0.1)
    floor = 0.1 * BASE.lr
    plain = _rates(BASE)
    assert _rates(config) == pytest.approx([floor + 0.9 * rate for rate in plain], rel=1e-12)
    assert learning_rate(config, 10**9 - 1, 10**9) == pytest.approx(floor, rel=1e-6)


def test_wsd_warms_up_stays_and_falls_to_zero() -> None:
    config = replace(BASE, schedule="wsd", warmup_steps=4, decay_steps=5)
    expected = [BASE.lr * k / 4 for k in (1, 2, 3, 4)] + [BASE.lr] * 11 + [BASE.lr * k / 5 for k in (5, 4, 3, 2, 1)]
    assert _rates(config, 20) == pytest.approx(expected, rel=1e-12)


def test_constant_and_warm_up_reach_the_peak_and_no_update_has_rate_zero() -> None:
    config = replace(BASE, schedule="constant", warmup_steps=4)
    assert _rates(config, 8) == pytest.approx([BASE.lr * k / 4 for k in (1, 2, 3, 4, 4, 4, 4, 4)], rel=1e-12)
    for schedule in ("cosine", "linear"):
        assert min(_rates(replace(BASE, schedule=schedule, warmup_steps=3))) > 0


def test_the_longest_warm_up_ends_with_the_run() -> None:
    config = replace(BASE, warmup_steps=STEPS)
    check_optim(config, STEPS)
    assert _rates(config)[-1] == BASE.lr


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schedule": "cosin"}, r"optim.schedule: found `cosin`; expected one of cosine, linear, wsd, constant"),
        ({"warmup_steps": 41}, r"optim.warmup_steps: found 41; expected 0 to train.steps = 40.*optim.warmup_steps=4"),
        ({"warmup_steps": -1}, r"optim.warmup_steps: found -1"),
        ({"schedule": "wsd"}, r"optim.decay_steps: found None; expected 1 to 40 steps.*optim.decay_steps=8"),
        ({"schedule": "wsd", "warmup_steps": 30, "decay_steps": 11}, r"optim.decay_steps: found 11; expected 1 to 10 steps"),
        ({"decay_steps": 5}, r"optim.decay_steps: found 5 with schedule cosine"),
        ({"min_lr_ratio": 1.5}, r"optim.min_lr_ratio: found 1.5; expected 0 to 1"),
        ({"lr": 0.0}, r"optim.lr: found 0; expected more than 0"),
        ({"lr": float("nan")}, r"optim.lr: found a number that is not one \(NaN\)"),
        ({"betas": [0.9]}, r"optim.betas: found \[0.9\]"),
        ({"betas": [0.9, 1.0]}, r"optim.betas"),
        ({"eps": 0.0}, r"optim.eps"),
        ({"weight_decay": -0.1}, r"optim.weight_decay"),
        ({"grad_clip": 0.0}, r"optim.grad_clip: found 0.*or optim.grad_clip=null"),
    ],
    ids=str,
)
def test_numbers_that_cannot_be_used_are_refused_with_what_to_type(change: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=f"(?s){message}"):
        check_optim(replace(BASE, **change), STEPS)  # type: ignore[arg-type]


def test_good_numbers_make_a_schedule() -> None:
    for change in ({}, {"grad_clip": None}, {"schedule": "wsd", "decay_steps": 40}, {"min_lr_ratio": 1.0}, {"betas": [0.0, 0.0]}):
        optim = replace(BASE, **change)  # type: ignore[arg-type]
        check_optim(optim, STEPS)
        rates = _rates(optim)
        assert max(rates) == pytest.approx(optim.lr, rel=0.01) and min(rates) >= 0 and max(rates) <= optim.lr, change


@pytest.mark.parametrize(("steps", "warmup"), [(1, 0), (3, 0), (4, 1), (6, 1), (20, 5), (79, 19), (80, 20), (1000, 20)])
def test_the_default_warm_up_fits_short_runs(steps: int, warmup: int) -> None:
    config = replace(BASE, warmup_steps=None)
    check_optim(config, steps)
    assert warmup_steps(config, steps) == warmup and warmup_steps(BASE, steps) == 0
    assert _rates(config, steps) == _rates(replace(BASE, warmup_steps=warmup), steps)


def test_after_its_end_a_schedule_keeps_its_last_rate() -> None:
    assert learning_rate(replace(BASE, min_lr_ratio=0.1), 55, STEPS) == pytest.approx(3e-5)
    assert [learning_rate(replace(BASE, schedule="wsd", decay_steps=4), step, STEPS) for step in (36, 39, 40, 41)] == pytest.approx(
        [3e-4, 0.75e-4, 0.0, 0.0]
    )
    ends = {"cosine": True, "linear": True, "constant": False}
    assert {name: ends_at_zero(replace(BASE, schedule=name), STEPS) for name in ends} == ends
    assert not ends_at_zero(replace(BASE, min_lr_ratio=0.1), STEPS) and ends_at_zero(replace(BASE, schedule="wsd", decay_steps=4), STEPS)
