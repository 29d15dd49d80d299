"""What is trained: model, data, optimizer, logging and the run's own settings. One frozen dataclass per config group."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from ..errors import ConfigError
from ..units import Tokens


class Dtype(Enum):
    """Precision of computation; weights, gradients' reduction and optimizer states are float32 (float64 for float64)."""

    BFLOAT16 = "bfloat16"
    FLOAT32 = "float32"
    FLOAT64 = "float64"


class Objective(Enum):
    """What is trained for (docs/objectives.md). A loss mask in the corpus makes language modelling fine-tuning."""

    LANGUAGE_MODELLING = "language_modelling"
    DPO = "dpo"
    GRPO = "grpo"


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig:
    """Objective, length, seed and numerics of the run."""

    steps: int
    seed: int = 0
    dtype: Dtype = Dtype.BFLOAT16
    z_loss: float = 0.0
    """Weight of mean(logsumexp(logits)^2), added to the loss per target token."""
    loss_chunk_tokens: Tokens = 2048
    """Tokens whose logits exist at one time: 10 bytes x vocabulary x this is the loss's peak."""
    objective: Objective = Objective.LANGUAGE_MODELLING
    """dpo needs corpora of pairs, grpo of completions with rewards (efflaunch data prepare)."""
    dpo_beta: float = 0.1
    """dpo only: how strongly the reference holds; the margin of log-probabilities is multiplied with it."""
    grpo_clip_low: float = 0.2
    """grpo only: how far below one the ratio to the old probability still counts."""
    grpo_clip_high: float = 0.2
    """grpo only: how far above one."""
    grpo_kl_weight: float = 0.0
    """grpo only: weight of the divergence from the reference, per token."""


def check_train(config: TrainConfig) -> None:
    """ConfigError where a length is none, or the settings of the objective make no sense."""
    for key, count, hint in (("steps", config.steps, 100), ("loss_chunk_tokens", config.loss_chunk_tokens, 2048)):
        if count < 1:
            raise ConfigError(f"train.{key}", found=str(count), expected="1 or more", hint=f"train.{key}={hint}")
    if config.objective is not Objective.LANGUAGE_MODELLING and config.z_loss:
        raise ConfigError(
            "train.z_loss",
            found=f"{config.z_loss} with train.objective={config.objective.value}",
            expected="it with language modelling only",
            hint="train.z_loss=0",
        )
    for key, value, valid, expected in (
        ("dpo_beta", config.dpo_beta, config.dpo_beta > 0, "more than 0"),
        ("grpo_clip_low", config.grpo_clip_low, 0 < config.grpo_clip_low <= 1, "more than 0, at most 1"),
        ("grpo_clip_high", config.grpo_clip_high, config.grpo_clip_high > 0, "more than 0"),
        ("grpo_kl_weight", config.grpo_kl_weight, config.grpo_kl_weight >= 0, "0 or more"),
    ):
        if not valid:
            default = TrainConfig.__dataclass_fields__[key].default
            raise ConfigError(f"train.{key}", found=str(value), expected=expected, hint=f"train.{key}={default}")
