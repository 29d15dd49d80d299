"""Learning rates of presets by objective, and what is said of a rate that is another objective's."""

from __future__ import annotations

import pytest

from efflaunch.launcher.commands.plan import notes
from efflaunch.launcher.config.checks import model_notes
from efflaunch.launcher.config.compose import compose, compose_group
from efflaunch.launcher.config.ledger import plan
from efflaunch.training.optimizers.check import USUAL_RATES, rate_notes
from efflaunch.training.optimizers.config import OptimConfig
from efflaunch.training.optimizers.lr_schedule import learning_rate

QUICK = ["+experiment=quickstart"]


@pytest.mark.parametrize(
    ("preset", "expected", "last"),
    [
        ("adamw", (3e-4, 0.95, 0.1, "cosine"), 3e-5),
        ("sft", (1e-5, 0.999, 0.0, "linear"), 0.0),
        ("dpo", (1e-6, 0.999, 0.0, "linear"), 0.0),
        ("grpo", (1e-6, 0.999, 0.0, "constant"), 1e-6),
    ],
)
def test_presets_differ_in_rate_decay_beta2_and_schedule(preset: str, expected: tuple[float, float, float, str], last: float) -> None:
    optim = OptimConfig(**compose_group("optim", preset))
    assert (optim.lr, optim.betas[1], optim.weight_decay, optim.schedule) == expected
    assert optim.warmup_steps is None, "20 steps, or a quarter of a short run"
    assert learning_rate(optim, 100, 100) == pytest.approx(last)
    assert USUAL_RATES.get(preset, optim.lr) == optim.lr


def test_pretrainings_rate_with_preferences_is_named_in_a_plan_and_at_the_start() -> None:
    wrong, right = (compose([*QUICK, "train.objective=dpo", f"optim.lr={rate}"]) for rate in (3e-4, 1e-6))
    note = "optim.lr=0.0003 is 300 times the usual rate of train.objective=dpo: optim=dpo has it"
    assert note in model_notes(wrong) and note in notes(wrong, plan(wrong))
    assert model_notes(right) == []


@pytest.mark.parametrize(("objective", "rate", "count"), [("language_modelling", 1.0, 0), ("grpo", 4.9e-5, 0), ("grpo", 6e-5, 1)])
def test_only_rates_far_above_are_named(objective: str, rate: float, count: int) -> None:
    assert len(rate_notes(OptimConfig(name="test", lr=rate), objective)) == count
