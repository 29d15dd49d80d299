"""Settings of training that make no sense."""

from __future__ import annotations

import math

import pytest

from efflaunch.errors import ConfigError
from efflaunch.training.config import DpoLoss, GrpoNormalize, GrpoRatio, Learn, Objective, TrainConfig, check_train

DPO, GRPO = {"objective": Objective.DPO}, {"objective": Objective.GRPO}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 0}, r"train.steps: found 0; expected 1 or more.*\n.*train.steps=100"),
        ({"loss_chunk_tokens": 0}, r"train.loss_chunk_tokens: found 0; expected 1 or more.*\n.*train.loss_chunk_tokens=2048"),
        ({"dpo_beta": 0.0}, r"train.dpo_beta: found 0; expected more than 0.*\n.*train.dpo_beta=0.1"),
        ({"grpo_clip_low": 1.5}, r"train.grpo_clip_low: found 1.5; expected more than 0, at most 1.*\n.*train.grpo_clip_low=0.2"),
        ({"grpo_clip_high": -1.0}, r"train.grpo_clip_high: found -1"),
        ({"grpo_kl_weight": -1.0}, r"train.grpo_kl_weight: found -1; expected 0 or more.*\n.*train.grpo_kl_weight=0"),
        ({"z_loss": 0.1, "objective": Objective.DPO}, r"train.z_loss: found 0.1 with train.objective=dpo.*\n.*train.z_loss=0"),
        ({"label_smoothing": 1.0}, r"train.label_smoothing: found 1; expected 0 to below 1.*\n.*train.label_smoothing=0"),
        ({**DPO, "label_smoothing": 0.1}, r"train.label_smoothing: found 0.1 with train.objective=dpo; .*\n.*train.label_smoothing=0"),
        ({**DPO, "learn": Learn.ALL}, r"train.learn: found all with train.objective=dpo; .*\n.*train.learn=assistant"),
        ({**DPO, "dpo_label_smoothing": 0.5}, r"train.dpo_label_smoothing: found 0.5; expected 0 to below 0.5"),
        ({**DPO, "dpo_loss": DpoLoss.ROBUST}, r"found 0 with train.dpo_loss=robust; expected .* more than 0.*\n.*smoothing=0.1"),
        (
            {**DPO, "dpo_loss": DpoLoss.IPO, "dpo_label_smoothing": 0.1},
            r"found 0.1 with train.dpo_loss=ipo; expected it with sigmoid and robust only.*\n.*train.dpo_label_smoothing=0",
        ),
        ({**DPO, "dpo_sft_weight": -1.0}, r"train.dpo_sft_weight: found -1; expected 0 or more.*\n.*train.dpo_sft_weight=0"),
        ({"dpo_sft_weight": 0.5}, r"train.dpo_sft_weight: found 0.5 with train.objective=language_modelling; .*\n.*=0"),
        (
            {**GRPO, "grpo_normalize": GrpoNormalize.DR_GRPO},
            r"train.grpo_max_completion: found null with train.grpo_normalize=dr_grpo; .*\n.*train.grpo_max_completion=1024",
        ),
        ({**GRPO, "grpo_max_completion": 64}, r"found 64 with train.grpo_normalize=dapo; .*\n.*train.grpo_max_completion=null"),
        ({**GRPO, "grpo_max_completion": 0}, r"train.grpo_max_completion: found 0; expected 1 or more"),
        ({**GRPO, "grpo_delta": 1.2}, r"train.grpo_delta: found 1.2 with train.grpo_clip_high=0.2; expected more than .*1.2.*\n.*=2.4"),
        ({**GRPO, "grpo_delta": 1.0}, r"train.grpo_delta: found 1; expected more than 1"),
        ({"grpo_ratio": GrpoRatio.SEQUENCE}, r"train.grpo_ratio: found sequence with train.objective=language.*\n.*train.grpo_ratio=token"),
        ({**DPO, "grpo_delta": 4.0}, r"train.grpo_delta: found 4.0 with train.objective=dpo; .*\n.*train.grpo_delta=null"),
        ({"dpo_loss": DpoLoss.IPO}, r"train.dpo_loss: found ipo with train.objective=language_modelling; .*dpo only.*\n.*=sigmoid"),
        ({"objective": Objective.GRPO, "dpo_label_smoothing": 0.1}, r"train.dpo_label_smoothing: found 0.1 with train.objective=grpo"),
    ],
)
def test_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_train(TrainConfig(**{"steps": 1, **changes}))  # type: ignore[arg-type]


def test_accepted_up_to_the_edge() -> None:
    """z-loss goes with the objectives that have logits of every token; a clip of one is the largest there is."""
    check_train(TrainConfig(steps=1, z_loss=0.1))
    check_train(TrainConfig(steps=1, objective=Objective.GRPO, grpo_clip_low=1.0))
    for loss in (DpoLoss.SIGMOID, DpoLoss.ROBUST):
        check_train(TrainConfig(steps=1, objective=Objective.DPO, dpo_loss=loss, dpo_label_smoothing=0.49))
    check_train(
        TrainConfig(steps=1, objective=Objective.GRPO, grpo_normalize=GrpoNormalize.DR_GRPO, grpo_max_completion=64, grpo_delta=1.3)
    )
    allowed = TrainConfig.RANGES["grpo_clip_low"]
    assert 1.0 in allowed and math.nextafter(1.0, 2.0) not in allowed
