"""Settings of what is trained: model, data, optimizer, logging, run. One frozen dataclass per config group."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import ClassVar

from ..errors import ConfigError
from ..units import Tokens
from ..utils.ranges import STEPS, TOKENS, Range, check_ranges


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


class Learn(Enum):
    """Which tokens are targets where a corpus has a loss mask."""

    ASSISTANT = "assistant"
    ALL = "all"


class DpoLoss(Enum):
    """Loss of a pair of answers (docs/objectives.md, training/objectives/preference.py)."""

    SIGMOID = "sigmoid"
    SIGMOID_NORM = "sigmoid_norm"
    HINGE = "hinge"
    IPO = "ipo"
    ROBUST = "robust"
    APO_ZERO = "apo_zero"


class GrpoNormalize(Enum):
    """What the sum over completion tokens is divided by (training/objectives/rollout.py)."""

    DAPO = "dapo"
    GRPO = "grpo"
    DR_GRPO = "dr_grpo"


class GrpoRatio(Enum):
    """What a ratio to the old probability is of."""

    TOKEN = "token"
    SEQUENCE = "sequence"


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainStage:
    """Settings of some of a run's steps, in place of those in `data` (docs/mixes.md)."""

    steps: int | None = None
    """Steps of the stage. None, in the last one: what is left of train.steps."""
    max_seq_len: Tokens | None = None
    """As data.max_seq_len, and at most that."""
    global_batch_tokens: Tokens | None = None
    """As data.global_batch_tokens, and at most that."""
    weights: dict[str, float] = field(default_factory=dict)
    """Weights of sources, by name; those that are not named keep the weight in data.sources."""

    RANGES: ClassVar[Mapping[str, Range]] = {
        "steps": Range(1, STEPS, example=100),
        "max_seq_len": Range(2, TOKENS, example=8192),
        "global_batch_tokens": Range(2, 1 << 50, example=65536),
        "weights": Range(0, 1e9),
    }


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig:
    """Objective, length, seed and numerics of the run."""

    steps: int
    stages: list[TrainStage] = field(default_factory=list)
    """Stages one after the other, each with a length, a batch and weights of its own, as [{steps: 900, max_seq_len: 8K}, {}]."""
    seed: int = 0
    dtype: Dtype = Dtype.BFLOAT16
    deterministic: bool = False
    """The same run gives the same bits on GPUs too: kernels add in one order, which takes time and memory (docs/checkpoints.md)."""
    z_loss: float = 0.0
    """Weight of mean(logsumexp(logits)^2), added to the loss per target token."""
    router_balance: float = 0.0
    """Models with experts: weight of the loss that evens their use over the whole step, summed over layers (docs/experts.md)."""
    router_z_loss: float = 0.0
    """Models with experts: weight of mean(logsumexp(router logits)^2) over the step's tokens, summed over layers."""
    router_bias_rate: float = 0.0
    """Models whose routers have a correction bias: how far each step moves it towards even use; 0: it stays (docs/experts.md)."""
    expert_capacity: float | None = None
    """Models with experts: rows that an expert takes of a document at most, over the mean; those beyond are dropped. null: none is."""
    loss_chunk_tokens: Tokens = 2048
    """Tokens whose logits exist at one time: 10 bytes x vocabulary x this is the loss's peak."""
    objective: Objective = Objective.LANGUAGE_MODELLING
    """dpo needs corpora of pairs, grpo of completions with rewards (efflaunch data prepare)."""
    learn: Learn = Learn.ASSISTANT
    """language_modelling only: assistant: the targets of the corpora's loss masks, where they have any; all: prompts and every turn too."""
    label_smoothing: float = 0.0
    """language_modelling only: share of each target's probability that is spread evenly over the vocabulary."""
    dpo_beta: float = 0.1
    """dpo only: how strongly the reference holds; the margin of log-probabilities is multiplied with it."""
    dpo_loss: DpoLoss = DpoLoss.SIGMOID
    """dpo only: what a pair costs; ipo and sigmoid_norm divide each answer's log-probability by its tokens."""
    dpo_label_smoothing: float = 0.0
    """dpo only, with sigmoid (conservative DPO) and robust: the share of pairs whose answers are taken to be swapped."""
    dpo_sft_weight: float = 0.0
    """dpo only: weight of the chosen answers' cross-entropy, a mean over their tokens in the step, added to the loss."""
    grpo_clip_low: float = 0.2
    """grpo only: how far below one the ratio to the old probability still counts."""
    grpo_clip_high: float = 0.2
    """grpo only: how far above one."""
    grpo_kl_weight: float = 0.0
    """grpo only: weight of the divergence from the reference, per token."""
    grpo_normalize: GrpoNormalize = GrpoNormalize.DAPO
    """grpo only: dapo: mean over the step's completion tokens; grpo: first over each completion's; dr_grpo: over grpo_max_completion."""
    grpo_max_completion: Tokens | None = None
    """grpo only, with grpo_normalize=dr_grpo: the tokens that every completion counts as, whatever its length."""
    grpo_delta: float | None = None
    """grpo only: the ratio counts no further than this, where the advantage is negative too (two-sided clip). null: no such end."""
    grpo_ratio: GrpoRatio = GrpoRatio.TOKEN
    """grpo only: sequence: every token has its completion's ratio, the geometric mean of its tokens' (GSPO)."""
    keep_best: str | None = None
    """Metric of an evaluation, as eval/web/loss: its best checkpoint is pinned, so never removed. None: none is."""
    patience: int | None = None
    """Evaluations in a row without a better train.keep_best after which the run ends. None: it never does."""

    RANGES: ClassVar[Mapping[str, Range]] = {
        "steps": Range(1, STEPS, example=100),
        "seed": Range(0, 1 << 63),
        "z_loss": Range(0, 1000),
        "router_balance": Range(0, 1000),
        "router_z_loss": Range(0, 1000),
        "router_bias_rate": Range(0, 1),
        "expert_capacity": Range(0, 1000, above=True),
        "loss_chunk_tokens": Range(1, TOKENS),
        "label_smoothing": Range(0, 1, below=True),
        "dpo_beta": Range(0, 1e6, above=True),
        "dpo_label_smoothing": Range(0, 0.5, below=True),
        "dpo_sft_weight": Range(0, 1e6),
        "grpo_clip_low": Range(0, 1, above=True),
        "grpo_clip_high": Range(0, 1e6, above=True),
        "grpo_kl_weight": Range(0, 1e6),
        "grpo_max_completion": Range(1, TOKENS, example=1024),
        "grpo_delta": Range(1, 1e6, above=True, example=4),
        "patience": Range(1, STEPS),
    }


def check_train(config: TrainConfig) -> None:
    """Raise ConfigError where a length is none, or the settings of the objective make no sense."""
    check_ranges(config, "train")
    if config.objective is not Objective.LANGUAGE_MODELLING and config.z_loss:
        raise ConfigError(
            "train.z_loss",
            found=f"{config.z_loss} with train.objective={config.objective.value}",
            expected="it with language modelling only",
            hint="train.z_loss=0",
        )
    _check_owner(config, Objective.LANGUAGE_MODELLING, "label_smoothing", 0)
    _check_owner(config, Objective.LANGUAGE_MODELLING, "learn", Learn.ASSISTANT.value)
    _check_dpo(config)
    _check_grpo(config)


def _check_dpo(config: TrainConfig) -> None:
    _check_owner(config, Objective.DPO, "dpo_loss", DpoLoss.SIGMOID.value)
    _check_owner(config, Objective.DPO, "dpo_label_smoothing", 0)
    _check_owner(config, Objective.DPO, "dpo_sft_weight", 0)
    loss, smoothing = config.dpo_loss, config.dpo_label_smoothing
    if loss is DpoLoss.ROBUST and not smoothing:
        raise ConfigError(
            "train.dpo_label_smoothing",
            found="0 with train.dpo_loss=robust",
            expected="the share of pairs that are swapped, more than 0",
            hint="train.dpo_label_smoothing=0.1, or train.dpo_loss=sigmoid",
        )
    if smoothing and loss not in (DpoLoss.SIGMOID, DpoLoss.ROBUST):
        raise ConfigError(
            "train.dpo_label_smoothing",
            found=f"{smoothing:g} with train.dpo_loss={loss.value}",
            expected="it with sigmoid and robust only",
            hint="train.dpo_label_smoothing=0",
        )


def _check_grpo(config: TrainConfig) -> None:
    _check_owner(config, Objective.GRPO, "grpo_normalize", GrpoNormalize.DAPO.value)
    _check_owner(config, Objective.GRPO, "grpo_max_completion", None)
    _check_owner(config, Objective.GRPO, "grpo_delta", None)
    _check_owner(config, Objective.GRPO, "grpo_ratio", GrpoRatio.TOKEN.value)
    length, delta = config.grpo_max_completion, config.grpo_delta
    if (config.grpo_normalize is GrpoNormalize.DR_GRPO) != (length is not None):
        raise ConfigError(
            "train.grpo_max_completion",
            found=f"{'null' if length is None else length} with train.grpo_normalize={config.grpo_normalize.value}",
            expected="the tokens every completion counts as, with dr_grpo and only there",
            hint=f"train.grpo_max_completion={'1024, the most a completion may have' if length is None else 'null'}",
        )
    if delta is not None and delta <= 1 + config.grpo_clip_high:
        raise ConfigError(
            "train.grpo_delta",
            found=f"{delta:g} with train.grpo_clip_high={config.grpo_clip_high:g}",
            expected=f"more than 1 + train.grpo_clip_high, {1 + config.grpo_clip_high:g}",
            hint=f"train.grpo_delta={2 * (1 + config.grpo_clip_high):g}, or train.grpo_delta=null",
        )


def _check_owner(config: TrainConfig, owner: Objective, name: str, default: object) -> None:
    """ConfigError where a key of one objective is set, not to `default`, and another is trained."""
    value = getattr(config, name)
    value = value.value if isinstance(value, Enum) else value
    if config.objective is not owner and value != default:
        raise ConfigError(
            f"train.{name}",
            found=f"{value} with train.objective={config.objective.value}",
            expected=f"it with train.objective={owner.value} only",
            hint=f"train.{name}={'null' if default is None else default}",
        )
